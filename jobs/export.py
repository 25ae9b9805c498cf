"""Convert a checkpoint for transformers, ONNX Runtime or the reference implementation, or to a model folder of ours.

    python jobs/export.py --checkpoint runs/1 --format huggingface --output my-tagger
    python jobs/export.py --checkpoint runs/1/averaged --format onnx --output tagger.onnx
    python jobs/export.py --checkpoint runs/1 --format onnx-waveform --output tagger.onnx --quantize int8 \\
        --data data --split eval
    python jobs/export.py --checkpoint audioset_10_10_0.4593.pth --format ours --output ast-audioset
    python jobs/export.py --checkpoint runs/1 --format huggingface --push-to-hub me/my-tagger
    python jobs/export.py --checkpoint mine.pth --recipe audioset-full --input_tdim 512 --labels classes.csv \\
        --format ours --output mine

A checkpoint is a run (its best model is used), a model folder, a Hugging Face folder, or a file of weights of the
reference implementation. The published files are recognised. For any other file of weights, give --labels and --recipe;
each recipe key can be set as an option. The job does not use Ray.

--push-to-hub uploads the files to the Hugging Face hub, with a model card made from the run: data, recipe, metrics with
intervals, classes, thresholds, limits. The token is that of `hf auth login` or HF_TOKEN.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence

from ast_core.errors import ConfigError
from jobs.common import JobParser, output_uri, run
from jobs.recipe_option import read_recipe, recipe_names

USE = {
    "ours": 'from ast_core.checkpoints import load_model; model, config = load_model("{}")',
    "original": 'torch.nn.DataParallel(audio_model).load_state_dict(torch.load("{}"))',
    "huggingface": 'transformers.pipeline("audio-classification", model="{}")(waveform)  # 16 kHz, in [-1, 1]',
    "onnx-waveform": 'onnxruntime.InferenceSession("{}").run(None, {{"waveform": waveform}})  # scores, start_s, end_s',
    "onnx": 'onnxruntime.InferenceSession("{}").run(["logits"], {{"fbank": fbank}})  # the norm is in its metadata',
}

CALIBRATED = ("ours", "onnx-waveform")
"""Formats that carry the calibration."""


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="C", help="path or URI")
    parser.add_argument("--format", required=True, choices=list(USE), help="ours: a model folder of this project")
    parser.add_argument("--output", metavar="URI", help="a new folder; for original, onnx and onnx-waveform, a file")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"for a file of weights: {', '.join(recipe_names())}, or a YAML file"
    )
    parser.add_argument("--labels", metavar="FILE", help="for a file of weights: CSV with index,mid,display_name")
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="also (or only) upload it with a model card, to OWNER/NAME on the hub"
    )
    parser.add_argument(
        "--public", action="store_true", help="a new repository on the hub is public (default: private)"
    )
    group = parser.add_argument_group("ONNX")
    group.add_argument("--quantize", choices=["int8"], help="store weights with 8 bits")
    group.add_argument("--data", metavar="URI", help="a prepared data set, to measure what --quantize costs in mAP")
    group.add_argument("--split", nargs="+", metavar="SPLIT", help="its splits; clips that the model has not seen")
    group.add_argument(
        "--raw-scores", action="store_true", help="ours, onnx-waveform: leave the model's calibration.json out"
    )
    parser.add_argument("--force", action="store_true", help="replace an --output that is a file or a model folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    if rest and args.recipe is None:
        raise ConfigError(f"{rest[0]} is not an option; recipe keys need --recipe")
    _check_onnx_options(args)
    if args.output is None and args.push_to_hub is None:
        raise ConfigError("give --output, --push-to-hub, or both")
    output = None if args.output is None else output_uri(args.output)
    from pipeline.train import export, hub  # PyTorch, which `--help` does not need
    from pipeline.train.export_to_hub import export_to_hub

    if output is not None:
        export.check_output(output, args.format, force=args.force)
    name = None if args.push_to_hub is None else hub.check_access(args.push_to_hub)
    has_calibration = args.format in CALIBRATED or name is not None
    checkpoint = export.read(
        args.checkpoint,
        None if args.recipe is None else read_recipe(args.recipe, rest),
        args.labels,
        calibrated=has_calibration and not args.raw_scores,
    )
    form = export.OnnxForm(
        from_waveform=args.format == "onnx-waveform",
        is_int8=args.quantize is not None,
        calibration=checkpoint.calibration,
        data=args.data,
        splits=args.split or (),
    )
    if name is not None:
        lines = export_to_hub(checkpoint, args.format, form, name=name, public=args.public, output=output)
    else:
        assert output is not None
        lines = export.write(output, args.format, checkpoint, form)
    for line in lines:
        print(line)
    if output is None:
        return 0
    config = checkpoint.config
    args_of_model = config.recipe.model_args()
    shape = ", ".join(f"{key} {value}" for key, value in args_of_model.items() if key not in ("name", "label_dim"))
    place = output.rsplit("/", 1)[-1] if "://" in output else output  # these libraries read no URIs: copy it first
    print(
        f"wrote {output}: {config.recipe.model}, {len(config.labels)} classes, {shape}\n"
        f"use: {USE[args.format].format(place)}"
    )
    return 0


def _check_onnx_options(args: argparse.Namespace) -> None:
    if args.quantize and not args.format.startswith("onnx"):
        raise ConfigError(f"--quantize is for --format onnx and onnx-waveform, not {args.format}")
    if args.raw_scores and args.format not in CALIBRATED:
        raise ConfigError(f"--raw-scores is for --format {' and '.join(CALIBRATED)}, not {args.format}")
    if bool(args.data) != bool(args.split) or (args.data and not args.quantize):
        raise ConfigError("give --data and --split together, and only with --quantize")


if __name__ == "__main__":
    run(main)
