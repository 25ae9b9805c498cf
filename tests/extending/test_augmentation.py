"""A new augmentation takes one file and one entry of AUGMENTATIONS: recipes list it, with settings of its own."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from ast_core.augment import AUGMENTATIONS
from ast_core.augment.augmentation import draw_augmentations
from ast_core.batch import model_input
from ast_core.checkpoints import load_model
from ast_core.errors import ConfigError
from ast_core.recipe import Recipe, load_recipe
from jobs import train
from pipeline.train.metrics_files import read_records
from tests import fakes
from tests.ast_core import small
from tests.conftest import OwnFolders
from tests.extending import registration


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    registration.register_augmentation()
    yield
    del AUGMENTATIONS["random_gain"]


def load(listed: str) -> Recipe:
    return load_recipe("", {"augmentations": listed}, origin="test")


def trained(data: str, run: Path, listed: str, num_workers: int = 0) -> list[float]:
    """The losses of two epochs."""
    command = ["--recipe", "audioset-balanced", "--data", data, "--train-splits", "train", "--eval-splits", "eval"]
    command += ["--output", str(run), "--num-workers", str(num_workers), "--augmentations", listed]
    keys = fakes.LINEAR_RECIPE | {"epochs": "2", "wa_start": "1", "wa_end": "2"}
    assert train.main([*command, *(word for key, value in keys.items() for word in (f"--{key}", value))]) == 0
    return [record["loss"] for record in read_records(str(run)) if "loss" in record]


def test_a_recipe_trains_with_a_new_augmentation(tone_data: str, tmp_path: Path):
    without, off, on = (
        trained(tone_data, tmp_path / name, f"[mixup, {entry}spec_augment]")
        for name, entry in (("without", ""), ("off", "random_gain: {max_nats: 0}, "), ("on", "random_gain, "))
    )
    assert off == without
    assert all(loss != other for loss, other in zip(on, without, strict=True))
    recorded = json.loads((tmp_path / "off" / "config.json").read_text())["recipe"]["augmentations"]
    assert recorded == ["mixup", {"random_gain": {"max_nats": 0}}, "spec_augment"]
    _, config = load_model(tmp_path / "off" / "best")
    assert config.recipe.to_dict()["augmentations"] == recorded


@pytest.mark.slow
def test_workers_train_and_resume_with_a_new_augmentation(tone_data: str, tmp_path: Path, own_folders: OwnFolders):
    """With a Ray whose workers know the augmentation."""
    listed = "[mixup, random_gain: {max_nats: 1}, spec_augment]"
    in_process = trained(tone_data, tmp_path / "in process", listed)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=str(own_folders.root / "ray-toy-augmentation"),
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": "tests.extending.registration.register_augmentation"},
    )
    try:
        by_worker = trained(tone_data, tmp_path / "run", listed, num_workers=1)
        (tmp_path / "run" / "summary.json").unlink()  # as if the run had been interrupted after its last checkpoint
        assert trained(tone_data, tmp_path / "run", listed, num_workers=1) == by_worker
    finally:
        ray.shutdown()
    assert by_worker == pytest.approx(in_process, rel=1e-5)


def test_a_new_augmentation_acts_where_it_is_listed():
    """Before SpecAugment it does not change the masks, which are 0; after it, they have the gain."""
    recipe = small.recipe(freqm=0, timem=0, mixup=0.0, augmentations=["random_gain"])
    batch, norm = small.batch(3), small.NORM
    drawn = draw_augmentations(recipe, (0,), 3)
    louder = model_input(batch, norm, drawn) - model_input(batch, norm)
    gain = torch.from_numpy(drawn[0].values["gain_nats"]) / (2 * norm.std)
    torch.testing.assert_close(louder, gain.view(3, 1, 1).expand_as(louder), rtol=0, atol=1e-5)
    masked = [
        model_input(batch, norm, draw_augmentations(small.recipe(mixup=0.0, augmentations=listed), (0,), 3))
        for listed in (["random_gain", "spec_augment"], ["spec_augment", "random_gain"])
    ]
    filled = torch.tensor(-norm.mean / (2 * norm.std))
    assert [(made == filled).any().item() for made in masked] == [True, False]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("random_gain: {max_nats: -1}", "random_gain in augmentations: max_nats is -1; use 0 or more"),
        ("random_gain: {max_nats: loud}", "random_gain in augmentations: max_nats is 'loud'; use a number"),
        ("random_gain: {max_db: 3}", "random_gain in augmentations: no setting 'max_db'; use max_nats"),
    ],
)
def test_settings_of_a_new_augmentation_are_checked(entry: str, message: str):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        load(f"[mixup, {entry}]")
