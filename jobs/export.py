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
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs

from ast_core.checkpoints import (
    CALIBRATION_FILE,
    CHECKPOINT_FILES,
    ModelConfig,
    save_huggingface,
    save_model,
    save_original,
)
from ast_core.checkpoints.onnx import save_onnx
from ast_core.errors import ConfigError
from ast_core.labels import LabelVocabulary
from ast_core.models.tagger import Tagger
from jobs.common import output_uri, run
from jobs.recipe_option import read_recipe, recipe_names
from pipeline import storage
from pipeline.train import models

USE = {
    "ours": 'from ast_core.checkpoints import load_model; model, config = load_model("{}")',
    "original": 'torch.nn.DataParallel(audio_model).load_state_dict(torch.load("{}"))',
    "huggingface": 'transformers.pipeline("audio-classification", model="{}")(waveform)  # 16 kHz, in [-1, 1]',
    "onnx": 'onnxruntime.InferenceSession("{}").run(["logits"], {{"fbank": fbank}})  # the norm is in its metadata',
}
SUFFIXES = {"original": ".pth", "onnx": ".onnx"}
"""Suffixes of the formats that are one file. The other formats are folders."""


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
    _check_output(output, args.format, args.force)
    model, config = _read(args, rest)
    with tempfile.TemporaryDirectory(prefix="ast-export-") as folder:
        made = Path(folder) / "made"
        _write(args.format, made, model, config)
        models.publish(made, output)
    args_of_model = config.recipe.model_args()
    shape = ", ".join(f"{key} {value}" for key, value in args_of_model.items() if key not in ("name", "label_dim"))
    place = output.rsplit("/", 1)[-1] if "://" in output else output  # these libraries read no URIs: copy it first
    print(
        f"wrote {output}: {config.recipe.model}, {len(config.labels)} classes, {shape}\n"
        f"use: {USE[args.format].format(place)}"
    )
    return 0


def _read(args: argparse.Namespace, rest: Sequence[str]) -> tuple[Tagger, ModelConfig]:
    """The model, and its config without the local paths of the weights from which training started."""
    model, config = models.read(
        models.find(args.checkpoint),
        recipe=None if args.recipe is None else read_recipe(args.recipe, rest),
        labels=None if args.labels is None else _labels(args.labels),
    )
    return model, replace(config, recipe=replace(config.recipe, imagenet_weights=None, audioset_weights=None))


def _check_output(output: str, output_format: str, force: bool) -> None:
    """Refuse an output that exists, before any work. With --force, a file or a model folder may be replaced."""
    fs, path = storage.resolve(output)
    found, suffix = fs.get_file_info(path), SUFFIXES.get(output_format)
    if suffix is None:
        if found.is_file or not (storage.is_empty(output) or (force and _contains_only_a_model(output))):
            raise ConfigError(
                f"{output} exists and is not empty; give a new folder, or --force to replace a model folder"
            )
    elif not output.endswith(suffix):
        raise ConfigError(f"--output is {output}, and the format is one file; give a name that ends in {suffix}")
    elif found.type != pafs.FileType.NotFound and not (force and found.is_file):
        raise ConfigError(f"{output} exists; give another --output, or --force to replace a file")


def _contains_only_a_model(folder: str) -> bool:
    return {file.rsplit("/", 1)[-1] for file in storage.list_files(folder, recursive=True)} <= {
        *CHECKPOINT_FILES,
        CALIBRATION_FILE,
    }


def _labels(uri: str) -> LabelVocabulary:
    return LabelVocabulary.from_csv(storage.read_text(uri), origin=uri)


def _write(output_format: str, target: Path, model: Tagger, config: ModelConfig) -> None:
    state = model.state_dict()
    match output_format:
        case "ours":
            save_model(target, state, config)
        case "original":
            save_original(target, model)
        case "huggingface":
            save_huggingface(target, state, config)
        case "onnx":
            save_onnx(target, model, config)


if __name__ == "__main__":
    run(main)
