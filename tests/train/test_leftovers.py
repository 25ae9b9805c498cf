"""Case C12 of the review: only folders that a crash left in the shared temporary folder are deleted."""

import os
import tempfile
from pathlib import Path

import pytest

from pipeline.train.metrics_log import delete_leftovers, temporary_prefix


def test_c12_links_and_files_of_others_are_kept_and_do_not_fail_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prefix = temporary_prefix("checkpoint", "a run")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "precious").touch()
    (tmp_path / f"{prefix}link").symlink_to(elsewhere)
    (tmp_path / f"{prefix}file").touch()
    left_over = Path(tempfile.mkdtemp(prefix=prefix))
    (left_over / "part").touch()
    delete_leftovers(prefix)
    assert not left_over.exists()
    assert sorted(os.listdir(tmp_path)) == sorted(["elsewhere", f"{prefix}link", f"{prefix}file"])
    assert (elsewhere / "precious").exists()
