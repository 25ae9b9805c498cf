"""Run a benchmark of this commit and of an older one in turns on one machine, and print the ratio of each figure.

    python -m benchmarks.against [--rounds 3] COMMIT feed|prepare|sections [OPTIONS OF THE BENCHMARK]

The speed of a machine drifts by more than the differences that matter, so only figures that were measured one after the
other are compared. The older commit is checked out into a temporary folder. The benchmark runs as a separate process in
the two trees in turns, with the code and data of each tree. If the older commit lacks the benchmark, it is copied
there. The output has the medians over the rounds, and new divided by old: below 1 is faster for milliseconds, and
slower for clips per second.
"""

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]

Figures = dict[tuple[str, str], float]
"""Figures by the names of row and column of a table, in the order of the table."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the older commit")
    parser.add_argument("benchmark", help="a module of this folder that prints a table of figures")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each commit")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the benchmark")
    args = parser.parse_args(argv)
    with older_tree(args.commit, args.benchmark) as older:
        found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for number in range(args.rounds):
            trees = [older, HERE] if number % 2 == 0 else [HERE, older]  # the second one runs on a warmer machine
            figures_of = {tree: figures(printed(tree, args.benchmark, args.options)) for tree in trees}
            for key, before in figures_of[older].items():
                if key in figures_of[HERE]:
                    found[key].append((before, figures_of[HERE][key]))
    if not found:
        raise SystemExit(f"the tables of {args.benchmark} at {args.commit} and here have no figure in common")
    print(f"| {args.benchmark} | figure | {args.commit} | here | ratio | lowest, highest |")
    print("|---|---|---|---|---|---|")
    for (row, column), pairs in found.items():
        ratios = [after / before for before, after in pairs]
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
        print(f"| {row} | {column} | {before:,.2f} | {after:,.2f} | {statistics.median(ratios):.2f} | {spread} |")
    return 0


@contextmanager
def older_tree(commit: str, benchmark: str) -> Iterator[Path]:
    """A folder with the files of a commit and the benchmark, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        tree = Path(folder, "older")
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", "--quiet", tree, commit], check=True)
        try:
            script = Path("benchmarks", f"{benchmark}.py")
            if not (tree / script).exists():
                (tree / script).write_bytes((HERE / script).read_bytes())
            yield tree
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", tree], check=True)


def printed(tree: Path, benchmark: str, options: Sequence[str]) -> str:
    """Run a benchmark of a tree. Returns what it printed."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *options]
    paths = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


def figures(text: str) -> Figures:
    """The numbers in the cells of the Markdown tables in a text; of several numbers in a cell, the first.

    A row's name is its first cell, with as many of the next ones as make the rows of its table differ.
    """
    found: Figures = {}
    for head, rows in tables(text):
        named = next((n for n in range(1, len(head)) if len({tuple(row[:n]) for row in rows}) == len(rows)), 1)
        for row in rows:
            for column, cell in zip(head[1:], row[1:], strict=True):
                if (number := re.match(r"[\d,]*\.?\d+", cell)) and float(number[0].replace(",", "")):
                    found[", ".join(row[:named]), column] = float(number[0].replace(",", ""))
    return found


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The head and the rows of each table, without the line between them."""
    lines = [line.strip() for line in text.splitlines()]
    for is_table, of_table in itertools.groupby(lines, key=lambda line: line.startswith("|")):
        if is_table:
            head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in of_table]
            yield head, [row for row in rows if not set("".join(row)) <= set("-: ")]


if __name__ == "__main__":
    sys.exit(main())
