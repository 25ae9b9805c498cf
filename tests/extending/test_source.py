"""A new source takes one file and one entry of the registry; the job reads it without a change."""

from pathlib import Path

import pandas as pd
import pytest

from jobs import prepare_audioset
from pipeline.prepare.sources import registry
from tests import fakes
from tests.extending.toy_source import LINES


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SOURCES", (*registry.SOURCES, LINES))


def test_the_job_prepares_a_list_of_a_new_source(local_ray: None, tmp_path: Path):
    for name, seed in (("a", 1), ("b c", 2)):
        fakes.write_media(tmp_path / f"{name}.wav", fakes.noise(0.5, seed=seed))
    (tmp_path / "pets.txt").write_text("a.wav cat\nb c.wav dog\nlost.wav dog\n")
    output = tmp_path / "data"
    assert prepare_audioset.main(["--lines", str(tmp_path / "pets.txt"), "--output", str(output)]) == 0
    index = pd.read_parquet(output / "pets" / "index.parquet")
    assert dict(zip(index["clip_id"], map(list, index["labels"]), strict=True)) == {"a": [0], "b c": [1]}
    failures = pd.read_parquet(output / "pets" / "failures.parquet")
    assert list(failures["reason"]) == ["missing_file"]


def test_the_help_lists_a_new_source(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        prepare_audioset.parser().parse_args(["--help"])
    assert "--lines FILE" in capsys.readouterr().out
