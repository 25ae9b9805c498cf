"""Which checkpoints a run resumes from if some are damaged or deleted."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.train.checkpoints import (
    DIGEST_FILE,
    RAY_SNAPSHOT,
    STATE_FILE,
    DamagedStateError,
    checkpoint_folders,
    load_state,
    save_state,
    unlisted_checkpoints,
)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """The folders of two checkpoints, earlier first, next to Ray's list."""
    folders = [tmp_path / "epoch-0001-step-000000-a", tmp_path / "epoch-0002-step-000000-b"]
    for folder in folders:
        folder.mkdir()
        save_state(str(folder), {"progress": {}})
    results = [{"checkpoint_dir_name": folder.name, "metrics": {}} for folder in folders]
    listed = {
        "checkpoint_results": results,
        "checkpoint_report_indices": [0, 1],
        "latest_checkpoint_result": results[1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 2,
    }
    (tmp_path / RAY_SNAPSHOT).write_text(json.dumps(listed))
    return folders


def test_a_valid_list_is_left_to_ray(tmp_path: Path, folders: list[Path]):
    assert unlisted_checkpoints(str(tmp_path)) == []
    assert (tmp_path / RAY_SNAPSHOT).exists()


def test_checkpoints_are_in_the_order_of_epochs_and_steps(tmp_path: Path):
    names = ["epoch-0999-step-000010-a", "epoch-9999-step-000000-b", "epoch-10000-step-000000-a"]
    for name in names:
        (tmp_path / name).mkdir()
        save_state(str(tmp_path / name), {"progress": {}})
    assert checkpoint_folders(str(tmp_path)) == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_list_with_a_missing_folder_is_replaced_by_existing_checkpoints(
    tmp_path: Path, folders: list[Path], missing: int
):
    shutil.rmtree(folders.pop(missing))
    assert unlisted_checkpoints(str(tmp_path)) == [str(folder) for folder in folders]
    assert not (tmp_path / RAY_SNAPSHOT).exists()


@pytest.mark.parametrize("text", ["", '{"checkpoint_resul', "null", "{}"])
def test_an_incomplete_list_is_replaced_by_existing_checkpoints(tmp_path: Path, folders: list[Path], text: str):
    (tmp_path / RAY_SNAPSHOT).write_text(text)
    assert unlisted_checkpoints(str(tmp_path)) == [str(folder) for folder in folders]
    assert not (tmp_path / RAY_SNAPSHOT).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_report_indices": [0]},
        {"latest_checkpoint_result": {"checkpoint_dir_name": "epoch-0003-step-000000-c", "metrics": {}}},
        {"pending_validation_specs": [True]},
        {"current_report_index": None},
    ],
)
def test_a_list_that_ray_would_reject_is_deleted_with_a_warning(
    tmp_path: Path, folders: list[Path], change: dict[str, object], caplog: pytest.LogCaptureFixture
):
    listed = json.loads((tmp_path / RAY_SNAPSHOT).read_text())
    (tmp_path / RAY_SNAPSHOT).write_text(json.dumps(listed | change))
    assert unlisted_checkpoints(str(tmp_path)) == [str(folder) for folder in folders]
    assert f"{tmp_path / RAY_SNAPSHOT} is damaged" in caplog.text


def test_an_upload_that_ended_before_ray_wrote_its_list_is_taken_where_it_is_whole(tmp_path: Path, folders: list[Path]):
    (tmp_path / RAY_SNAPSHOT).unlink()
    (folders[1] / STATE_FILE).write_bytes(b"cut off by a full disk")
    assert unlisted_checkpoints(str(tmp_path)) == [str(folders[0])]
    (folders[0] / DIGEST_FILE).unlink()
    assert unlisted_checkpoints(str(tmp_path)) == []


@pytest.mark.parametrize("name", [STATE_FILE, DIGEST_FILE])
@pytest.mark.parametrize("garbled", [b"", b"\xff\xfe\x00 no text"])
def test_a_changed_state_or_digest_is_a_damaged_state(folders: list[Path], name: str, garbled: bytes):
    assert load_state(str(folders[0])) == {"progress": {}}
    (folders[0] / name).write_bytes(garbled)
    with pytest.raises(DamagedStateError, match=r"^state\.pt does not match state\.sha256$"):
        load_state(str(folders[0]))
