"""The jobs on a cluster that starts from no node, with the node types of cluster.yaml."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.dataset import PreparedDataset
from tests import fakes
from tests.conftest import ROOT, OwnFolders
from tests.fakes import LINEAR_RECIPE
from tests.scaled_cluster import ScaledCluster, scaled_cluster

NUM_CLIPS = 96

HOLD_GPUS = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
group = ray.util.placement_group([{"CPU": 4, "GPU": 1}] * 4)  # as a training with four ranks asks for them
ray.get(group.ready())
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def cluster(own_folders: OwnFolders) -> Iterator[ScaledCluster]:
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["available_node_types"]
    kept = ("resources", "labels", "min_workers", "max_workers")
    workers = {name: {key: types[name][key] for key in kept if key in types[name]} for name in ("prepare", "train")}
    workers["prepare"]["resources"]["CPU"] = 1  # 32 tasks at once are too many for the machine of a test
    folder = own_folders.root / "k"
    folder.mkdir()
    with scaled_cluster(folder, workers) as running:
        yield running


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of clips of two seconds."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = ["path,labels,split"]
    for i in range(NUM_CLIPS):
        fakes.write_media(folder / f"{i}.wav", fakes.tone(200.0 + 10 * i, 2.0) + fakes.noise(2.0, i))
        lines.append(f"{i}.wav,{'low' if i % 2 else 'high'},{'train' if i % 3 else 'eval'}")
    listed = folder / "list.csv"
    listed.write_text("\n".join(lines) + "\n")
    return listed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nodes_come_from_none_for_each_job_and_go(cluster: ScaledCluster, sounds: Path, tmp_path: Path):
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    on_cluster = ("--address", cluster.address)
    assert cluster.nodes() == {}

    # A preparation beside a training: CPU nodes start, and the idle CPUs of the GPU node are left alone.
    with cluster.started("-c", HOLD_GPUS, cluster.address) as training:
        cluster.wait_for(lambda nodes: nodes == {"train": 1}, training)
        cluster.run("jobs/prepare_audioset.py", "--manifest", str(sounds), "--output", data, *on_cluster)
        ran = cluster.types_of_tasks()
        assert set(ran) >= {"MapBatches(Stages)", "_publish", "write_report"}
        assert set().union(*ran.values()) == {"prepare"}
        assert cluster.nodes()["train"] == 1
    assert sum(len(PreparedDataset.open(data).index(split)) for split in ("train", "eval")) == NUM_CLIPS
    cluster.wait_for(lambda nodes: nodes == {})

    # A training asks for GPU nodes. These have none, so its ranks fail.
    small = [word for key, value in LINEAR_RECIPE.items() for word in (f"--{key}", value)]
    train = ["jobs/train.py", "--recipe", "esc10", "--data", data, "--train-splits", "train", "--eval-splits", "eval"]
    train += ["--num-workers", "2", *small, "--epochs", "1", "--batch_size", "4", "--loss", "BCE", *on_cluster]
    with cluster.started(*train, "--output", f"{run}-cuda", "--device", "cuda", "--max-failures", "0") as training:
        cluster.wait_for(lambda nodes: nodes == {"train": 1}, training)
    cluster.wait_for(lambda nodes: nodes == {})

    # On CPUs it runs, on CPU nodes. The evaluation runs there too, and then all nodes go.
    cluster.run(*train, "--output", run, "--device", "cpu", "--cpus-per-worker", "1")
    evaluate = ["jobs/evaluate.py", "--checkpoint", run, "--data", data, "--split", "eval", "--device", "cpu"]
    assert "on 32 clips of eval" in cluster.run(*evaluate, *on_cluster)
    cluster.wait_for(lambda nodes: nodes == {})
    assert list(cluster.types.values()).count("train") == 2
