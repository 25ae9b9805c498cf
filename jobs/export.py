"""Convert a checkpoint for transformers, ONNX Runtime or the reference implementation, or to a model folder of ours.

    python jobs/export.py --checkpoint runs/1 --format huggingface --output my-tagger
    python jobs/export.py --checkpoint runs/1/averaged --format onnx --output tagger.onnx
    python jobs/export.py --checkpoint audioset_10_10_0.4593.pth --format ours --output ast-audioset
    python jobs/export.py --checkpoint mine.pth --recipe audioset-full --input_tdim 512 --labels classes.csv \\
        --format ours --output mine

A checkpoint is a run (its best model is used), a model folder, a Hugging Face folder, or a file of weights of the
reference implementation. The published files are recognised. For any other file of weights, give --labels and --recipe;
each recipe key can be set as an option. The job does not use Ray.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence

from ast_core.errors import ConfigError
from jobs.common import output_uri, run
from jobs.recipe_option import read_recipe, recipe_names

USE = {
    "ours": 'from ast_core.checkpoints import load_model; model, config = load_model("{}")',
    "original": 'torch.nn.DataParallel(audio_model).load_state_dict(torch.load("{}"))',
    "huggingface": 'transformers.pipeline("audio-classification", model="{}")(waveform)  # 16 kHz, in [-1, 1]',
    "onnx": 'onnxruntime.InferenceSession("{}").run(["logits"], {{"fbank": fbank}})  # the norm is in its metadata',
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, metavar="C", help="path or URI")
    parser.add_argument("--format", required=True, choices=list(USE), help="ours: a model folder of this project")
    parser.add_argument("--output", required=True, metavar="URI", help="a new folder; for original and onnx, a file")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"for a file of weights: {', '.join(recipe_names())}, or a YAML file"
    )
    parser.add_argument("--labels", metavar="FILE", help="for a file of weights: CSV with index,mid,display_name")
    parser.add_argument("--force", action="store_true", help="replace an --output that is a file or a model folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    if rest and args.recipe is None:
        raise ConfigError(f"{rest[0]} is not an option; recipe keys need --recipe")
    output = output_uri(args.output)
    from pipeline.train import export  # PyTorch, which `--help` does not need

    export.check_output(output, args.format, force=args.force)
    model, config = export.read(
        args.checkpoint, None if args.recipe is None else read_recipe(args.recipe, rest), args.labels
    )
    export.write(output, args.format, model, config)
    args_of_model = config.recipe.model_args()
    shape = ", ".join(f"{key} {value}" for key, value in args_of_model.items() if key not in ("name", "label_dim"))
    place = output.rsplit("/", 1)[-1] if "://" in output else output  # these libraries read no URIs: copy it first
    print(
        f"wrote {output}: {config.recipe.model}, {len(config.labels)} classes, {shape}\n"
        f"use: {USE[args.format].format(place)}"
    )
    return 0


if __name__ == "__main__":
    run(main)
