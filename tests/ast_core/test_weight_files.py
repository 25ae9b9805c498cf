"""Published weights are fetched once from the hub, by revision, and only the pinned file is accepted."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ast_core.errors import DataError
from ast_core.weight_files import read_weights
from tests.ast_core import hub
from tests.processes import in_new_process

REVISION = "0123456789abcdef0123456789abcdef01234567"
PATH = f"/owner/ast/resolve/{REVISION}/model.safetensors"
CONTENT = save({"v.cls_token": torch.arange(3.0)})


def fetched(endpoint: str, cache: Path, *, sha256: str, offline: bool = False) -> str:
    """The result in a new process with the hub at `endpoint`, which the hub's client reads when it is imported."""
    env = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    return in_new_process(hub.fetch_and_read, "owner/ast", REVISION, "model.safetensors", sha256, env=env)


def test_weights_are_fetched_once_and_then_read_from_the_cache(tmp_path: Path):
    pinned = hashlib.sha256(CONTENT).hexdigest()
    with hub.serving(PATH, CONTENT) as (endpoint, asked):
        for _ in range(2):
            assert fetched(endpoint, tmp_path, sha256=pinned) == "[0.0, 1.0, 2.0]"
        assert asked.count(f"GET {PATH}") == 1


def test_a_damaged_copy_in_the_cache_is_fetched_again(tmp_path: Path):
    pinned = hashlib.sha256(CONTENT).hexdigest()
    with hub.serving(PATH, CONTENT) as (endpoint, asked):
        fetched(endpoint, tmp_path, sha256=pinned)
        (cached,) = tmp_path.rglob("model.safetensors")
        cached.resolve().write_bytes(CONTENT[:-1] + b"!")
        assert fetched(endpoint, tmp_path, sha256=pinned) == "[0.0, 1.0, 2.0]"
        assert asked.count(f"GET {PATH}") == 2


def test_a_file_other_than_the_pinned_one_is_refused(tmp_path: Path):
    with hub.serving(PATH, CONTENT) as (endpoint, _):
        result = fetched(endpoint, tmp_path, sha256="0" * 64)
    assert result.startswith("DataError:")
    assert "is not the published checkpoint: sha256" in result


def test_without_a_network_the_error_names_audioset_weights(tmp_path: Path):
    result = fetched("http://127.0.0.1:9", tmp_path, sha256="0" * 64, offline=True)
    assert result.startswith("DataError: could not fetch model.safetensors of owner/ast")
    assert result.endswith(
        f"run `hf download owner/ast model.safetensors --revision {REVISION} --local-dir .`, and give that file as "
        "audioset_weights"
    )


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
def test_a_state_dict_is_found_under_its_usual_names(key: str | None, tmp_path: Path):
    state = {"module.a": torch.arange(3.0)}
    torch.save(state if key is None else {"epoch": 5, key: state}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").keys() == state.keys()
    torch.save({"epoch": 5, "net": state}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="contains no state dict"):
        read_weights(tmp_path / "a.pth")
