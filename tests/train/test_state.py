"""Which checkpoints a run goes on from when a disk, or somebody, has been at them."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.train.state import (
    DIGEST_FILE,
    RAYS_LIST,
    STATE_FILE,
    DamagedStateError,
    load_state,
    save_state,
    unlisted_checkpoints,
)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Of two checkpoints, the earlier first, with Ray's list beside them."""
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
    (tmp_path / RAYS_LIST).write_text(json.dumps(listed))
    return folders


def test_a_list_of_folders_that_are_all_there_is_rays_to_read(tmp_path: Path, folders: list[Path]):
    assert unlisted_checkpoints(str(tmp_path)) == []
    assert (tmp_path / RAYS_LIST).exists()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_list_that_names_a_missing_folder_is_dropped_for_what_is_there(
    tmp_path: Path, folders: list[Path], missing: int
):
    shutil.rmtree(folders.pop(missing))
    assert unlisted_checkpoints(str(tmp_path)) == [str(folder) for folder in folders]
    assert not (tmp_path / RAYS_LIST).exists()


@pytest.mark.parametrize("text", ["", '{"checkpoint_resul', "null", "{}"])
def test_a_list_that_is_cut_off_or_none_is_dropped_for_what_is_there(tmp_path: Path, folders: list[Path], text: str):
    (tmp_path / RAYS_LIST).write_text(text)
    assert unlisted_checkpoints(str(tmp_path)) == [str(folder) for folder in folders]
    assert not (tmp_path / RAYS_LIST).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_report_indices": [0]},
        {"latest_checkpoint_result": {"checkpoint_dir_name": "epoch-0003-step-000000-c", "metrics": {}}},
        {"pending_validation_specs": [True]},
        {"current_report_index": None},
    ],
)
def test_a_list_that_ray_would_end_on_is_dropped_and_named(
    tmp_path: Path, folders: list[Path], change: dict[str, object], caplog: pytest.LogCaptureFixture
):
    listed = json.loads((tmp_path / RAYS_LIST).read_text())
    (tmp_path / RAYS_LIST).write_text(json.dumps(listed | change))
    assert unlisted_checkpoints(str(tmp_path)) == [str(folder) for folder in folders]
    assert f"{tmp_path / RAYS_LIST} is damaged" in caplog.text


def test_an_upload_that_ended_before_ray_wrote_its_list_is_taken_where_it_is_whole(tmp_path: Path, folders: list[Path]):
    (tmp_path / RAYS_LIST).unlink()
    (folders[1] / STATE_FILE).write_bytes(b"cut off by a full disk")
    assert unlisted_checkpoints(str(tmp_path)) == [str(folders[0])]
    (folders[0] / DIGEST_FILE).unlink()
    assert unlisted_checkpoints(str(tmp_path)) == []


@pytest.mark.parametrize("name", [STATE_FILE, DIGEST_FILE])
@pytest.mark.parametrize("garbled", [b"", b"\xff\xfe\x00 no text"])
def test_a_state_or_a_digest_that_was_garbled_is_a_damaged_state(folders: list[Path], name: str, garbled: bytes):
    assert load_state(str(folders[0])) == {"progress": {}}
    (folders[0] / name).write_bytes(garbled)
    with pytest.raises(DamagedStateError, match=r"^state\.pt is not as it was written$"):
        load_state(str(folders[0]))
