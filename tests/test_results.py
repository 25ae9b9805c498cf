"""The fidelity table of RESULTS.md names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_fidelity_table_names_exists():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    (table,) = (part for part in results.split("\n## ") if part.startswith("Fidelity"))
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    named = re.findall(r"(test_\w+): (\w+)", "\n".join(rows))
    assert len(named) >= len(rows) - 1 > 10  # one says "the same"
    for module, beginning in named:
        (file,) = ROOT.glob(f"tests/**/{module}.py")
        assert f"def test_{beginning}" in file.read_text(encoding="utf-8"), f"{module}: {beginning}"
