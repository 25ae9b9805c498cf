"""Run the README's five lines as printed, and count the training clips with correct classes, by seed and sounds.

    python -m benchmarks.first_model [--seeds 0 1 2] [TRAIN OPTION …]

A clip is right if exactly its own classes score above 0.5. The sounds are ESC-10's recordings, if they exist, and
synthesised tones in noise. Further options are passed to jobs/train.py after the printed ones.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.readme_example import ESC10, NUM_CLIPS, num_right, printed_lines, type_command, write_sounds

MODELS = ("best", "averaged")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, train_options = parser.parse_known_args()
    prepare, train = printed_lines()[1]
    print(f"sounds       seed  right of {NUM_CLIPS} (best)  right of {NUM_CLIPS} (averaged)  training s")
    for recorded in [True, False] if ESC10.is_dir() else [False]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_sounds(folder, recorded=recorded)
            type_command(prepare, folder)
            for seed in args.seeds:
                run = f"run{seed}"
                began_s = time.monotonic()
                type_command(train, folder, "--seed", str(seed), "--output", run, *train_options)
                train_s = time.monotonic() - began_s
                best, averaged = (score(folder, f"{run}/{model}") for model in MODELS)
                sounds = "ESC-10" if recorded else "synthesized"
                print(f"{sounds:11}  {seed:4}  {best:15}  {averaged:19}  {train_s:10.0f}", flush=True)
    return 0


def score(folder: Path, checkpoint: str) -> int:
    """Number of training clips that the model classifies correctly."""
    table = f"{checkpoint}.parquet".replace("/", "-")
    options = ["--checkpoint", checkpoint, "--data", "mine", "--split", "train", "--bootstrap", "0", "--scores", table]
    type_command("python jobs/evaluate.py", folder, *options)
    return num_right(folder / table, folder / "mine")


if __name__ == "__main__":
    sys.exit(main())
