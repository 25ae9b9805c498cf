"""cluster.yaml, tested without a cloud: Ray's schema and scheduler, and the shell commands of the nodes."""

import copy
import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from itertools import filterfalse
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from jobs import train
from pipeline.cluster import NOT_ON_GPU_NODES
from pipeline.prepare import plan
from tests import autoscaler

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster.yaml"
HEAD_IP = "10.0.0.7"
PACKAGE_INDEX = re.compile(
    r"--index-url|--extra-index-url|--find-links|--trusted-host|^\s*-[if]\s|https://|http://(?!127\.0\.0\.1)", re.M
)


def cluster(path: str = "", value: Any = None) -> dict[str, Any]:
    """The file's content, with one value changed: `cluster("available_node_types.train.min_workers", 1)`."""
    config = copy.deepcopy(yaml.safe_load(CLUSTER.read_text(encoding="utf-8")))
    if path:
        *parents, key = path.split(".")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[key] = value
    return config


def ray_reads(config: dict[str, Any]) -> AutoscalingConfig:
    """Check the file with Ray's schema, and return the settings with Ray's defaults, as `ray up` uses them."""
    jsonschema.validate(config, json.loads((files("ray.autoscaler") / "ray-schema.json").read_text()))
    return AutoscalingConfig(config, skip_content_hash=True)


def test_ray_accepts_cluster_yaml():
    ray_reads(cluster())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("setup_command", [], "Additional properties"),
        ("available_node_types.train.memory", 1, "Additional properties"),
        ("available_node_types.train.resources.GPU", "four", "integer"),
        ("setup_commands", "pip install ray", "array"),
        ("provider", {"region": "us-west-2"}, "'type' is a required property"),
        ("head_node_type", "heads", "must be one of"),
        ("available_node_types.train.min_workers", 7, "smaller than"),
    ],
)
def test_ray_refuses_a_broken_cluster_yaml(path: str, value: Any, message: str):
    with pytest.raises((ValueError, jsonschema.ValidationError), match=message):
        ray_reads(cluster(path, value))


def complaints(config: dict[str, Any]) -> list[str]:
    """Violations of our own rules, which Ray does not check."""
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    workers = {name: settings for name, settings in types.items() if settings is not head}
    most = {name: settings.get("max_workers", config["max_workers"]) for name, settings in workers.items()}
    rules = {
        "the head takes work": head["resources"].get("CPU") != 0 or head["resources"].get("GPU") != 0,
        "more than one head": head.get("max_workers", 0) > 0,
        "workers do not scale from zero": any(settings["min_workers"] > 0 for settings in workers.values()),
        "a worker type can never start": 0 in most.values(),
        "max_workers is below that of the worker types": sum(most.values()) > config["max_workers"],
        "idle nodes stay": not 0 < config["idle_timeout_minutes"] <= 60,
        "real account or image ids": bool(re.search(r"ami-[0-9a-f]{8}|\d{12}|arn:(?!.*REPLACE_ME)", str(types))),
    }
    return [rule for rule, broken in rules.items() if broken]


def test_cluster_yaml_follows_our_own_rules():
    assert complaints(cluster()) == []


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("available_node_types.head.resources", {"CPU": 4, "GPU": 0}, "the head takes work"),
        ("available_node_types.head.resources", {}, "the head takes work"),  # Ray would fill in the machine's resources
        ("available_node_types.head.max_workers", 1, "more than one head"),
        ("available_node_types.train.min_workers", 1, "workers do not scale from zero"),
        ("available_node_types.train.max_workers", 0, "a worker type can never start"),
        ("max_workers", 5, "max_workers is below that of the worker types"),
        ("idle_timeout_minutes", 0, "idle nodes stay"),
        ("available_node_types.train.node_config.ImageId", "ami-0123456789abcdef0", "real account or image ids"),
    ],
)
def test_our_own_rules_find_a_broken_cluster_yaml(path: str, value: Any, complaint: str):
    assert complaints(cluster(path, value)) == [complaint]


def nodes_for(demand: dict[str, float], count: int, config: dict[str, Any], **options: Any) -> dict[str, int]:
    return autoscaler.nodes_for(demand, count, ray_reads(config), **options)


def test_preparation_starts_cpu_nodes_and_no_gpu_nodes():
    settings = cluster()["available_node_types"]["prepare"]
    node_cpus, most = settings["resources"]["CPU"], settings["max_workers"]
    of_preparation = partial(nodes_for, config=cluster(), selector=NOT_ON_GPU_NODES)
    assert of_preparation({"CPU": plan.DOWNLOAD_CPUS / 4}, 4) == {"prepare": 1}
    assert of_preparation({"CPU": plan.STAGE_CPUS}, 1) == {"prepare": 1}
    assert of_preparation({"CPU": plan.STAGE_CPUS}, int(node_cpus / plan.STAGE_CPUS) + 1) == {"prepare": 2}
    assert of_preparation({"CPU": plan.STAGE_CPUS}, 10 * most * node_cpus) == {"prepare": most}
    assert of_preparation({"CPU": node_cpus + 1}, 1) == {}


def test_training_starts_gpu_nodes_and_uses_all_their_gpus():
    rank = {"CPU": train.CPUS_WITH_GPU, "GPU": 1}
    settings = cluster()["available_node_types"]["train"]
    gpus = settings["resources"]["GPU"]
    assert nodes_for(rank, 1, cluster()) == {"train": 1}
    assert nodes_for(rank, gpus, cluster()) == {"train": 1}
    assert nodes_for(rank, gpus * settings["max_workers"], cluster()) == {"train": settings["max_workers"]}
    too_few = {"CPU": train.CPUS_WITH_GPU - 1, "GPU": gpus}
    assert nodes_for(rank, 1, cluster("available_node_types.train.resources", too_few)) == {}


class Node:
    """Runs a node's commands in a home folder whose `python3`, `python`, `ray` and `sudo` only log their calls."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.home, self.notes = folder / "home", folder / "notes"
        folder.mkdir(parents=True, exist_ok=True)
        self.notes.touch()
        for remote in config["file_mounts"]:
            self._write(self.home / remote.removeprefix("~/"), "as rsync leaves it")
        note = f'#!/bin/sh\necho "${{RAY_AUTH_MODE:-disabled}} $0 $*" >> {shlex.quote(str(self.notes))}\n'
        for program in (folder / "bin/python3", self.home / "venv/bin/python", self.home / "venv/bin/ray"):
            self._write(program, note)
        self._write(folder / "bin/sudo", note)  # so that nothing is installed
        self._write(folder / "bin/ray", "#!/bin/sh\nexit 1\n")  # so that no installed Ray is called
        self.env = {"HOME": str(self.home), "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "RAY_HEAD_IP": HEAD_IP}

    def run(self, commands: list[str]) -> list[str]:
        """Run commands. Returns all calls of the node so far, each as `auth mode, program, arguments`."""
        for command in commands:  # like Ray's launcher: each in its own shell, with ~/.bashrc
            subprocess.run(["bash", "-c", f"source ~/.bashrc; ({command})"], env=self.env, check=True)
        return self.notes.read_text().replace(f"{self.home}/", "~/").splitlines()

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def started(folder: Path, kind: str, config: dict[str, Any]) -> tuple[Node, list[str]]:
    """A node of `kind` head or worker after set-up and start, and its calls."""
    node = Node(folder, config)
    both = ray_reads(config).get_raw_config_mutable()  # Ray has put setup_commands first
    return node, node.run(both[f"{kind}_setup_commands"] + both[f"{kind}_start_ray_commands"])


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_setup_installs_the_pinned_requirements_into_rays_python(tmp_path: Path, kind: str):
    config = cluster()
    node, calls = started(tmp_path, kind, config)
    assert any(call.endswith("python3 -m venv ~/venv") for call in calls)
    assert not any("apt-get" in call for call in calls)  # the node has what it needs
    assert "disabled ~/venv/bin/python -m pip install --quiet --require-hashes -r ~/requirements.txt" in calls
    assert (ROOT / config["file_mounts"]["~/requirements.txt"]).samefile(ROOT / "requirements.txt")
    assert (node.home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    node.run(config["setup_commands"])
    assert len((node.home / ".bashrc").read_text().splitlines()) == 1, "a second set-up adds lines again"


@pytest.mark.parametrize("lacks", ["-m venv", "-c"])
def test_a_node_without_venv_or_compiler_gets_both(tmp_path: Path, lacks: str):
    """torch.compile needs a C++ compiler and Python's header files on GPU nodes."""
    node = Node(tmp_path, cluster())
    python = tmp_path / "bin/python3"
    installs = 'grep -q "apt-get -qq install" "$NOTES"'
    python.write_text(f'{python.read_text()}case "$*" in "{lacks}"*) {installs};; esac\n')
    node.env["NOTES"] = str(node.notes)
    calls = node.run(cluster()["setup_commands"])
    (install,) = [call for call in calls if "apt-get -qq install" in call]
    assert {"g++", "gcc", "python3-dev", "python3-venv"} <= set(install.split())
    assert [call.split()[-2:] for call in calls if "-m venv" in call] == [["venv", "~/venv"]] * 2


def test_workers_join_the_head_and_both_require_the_token(tmp_path: Path):
    _, head = started(tmp_path / "head", "head", cluster())
    _, worker = started(tmp_path / "worker", "worker", cluster())
    (start_head,) = [call for call in head if "ray start" in call]
    (start_worker,) = [call for call in worker if "ray start" in call]
    assert start_head.startswith("token ~/venv/bin/ray start --head --port=6379 ")
    assert start_worker.startswith(f"token ~/venv/bin/ray start --address={HEAD_IP}:6379 ")
    assert {"--autoscaling-config=~/ray_bootstrap_config.yaml", "--dashboard-host=127.0.0.1"} <= set(start_head.split())
    assert cluster()["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"  # where Ray writes and reads the token


def test_node_without_set_up_does_not_start(tmp_path: Path):
    commands = [command for command in cluster()["setup_commands"] if ".bashrc" not in command]
    with pytest.raises(subprocess.CalledProcessError):
        started(tmp_path, "head", cluster("setup_commands", commands))


def test_nodes_run_the_same_version_of_ray():
    pins = re.findall(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert pins == [ray.__version__]


def test_boto3_of_the_head_has_the_version_of_botocore():
    (boto3,) = re.findall(r"boto3==(\S+)", " ".join(cluster()["head_setup_commands"]))
    assert re.findall(r"^botocore==(\S+)", (ROOT / "requirements.txt").read_text(), re.M) == [boto3]


@pytest.mark.parametrize("path", [CLUSTER, *sorted(ROOT.glob("requirements*.txt"))], ids=lambda path: path.name)
def test_no_package_index_is_named(path: Path):
    assert PACKAGE_INDEX.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://example.org/simple",
        "--extra-index-url=http://10.0.0.1/simple",
        "-i mirror",
        "--find-links wheels",
        "torch @ https://example.org/torch.whl",
        "  - pip install ray -r http://example.org/requirements.txt",
    ],
)
def test_package_index_would_be_found(line: str):
    assert PACKAGE_INDEX.search(f"numpy==2.0\n{line}\n")


def is_packed() -> Callable[[str], bool]:
    """Whether `ray job submit --working-dir .` sends a path of the project to the cluster."""
    excludes = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    return lambda path: not any(exclude(ROOT / path) for exclude in excludes)


def test_results_and_keys_of_the_pages_are_not_sent_to_the_cluster():
    pages = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    commands = "".join(re.findall(r"^```\w*\n(.*?)^```$", pages, re.M | re.S))
    options = r"--(?:output|input|data|checkpoint|examples|scores)"
    named = {"cookies.txt", *re.findall(rf"{options} ([a-z][\w.-]*)(?=[\s/])", commands)}
    assert {"tags", "comparison", "my-tagger", "mine", "esc50", "tagger.onnx", "barking.wav"} <= named
    packed = {name for name in named if is_packed()(name if "." in name else f"{name}/file")}
    assert packed == {"owls.csv"}, "add them to .gitignore"


def test_the_code_is_sent_to_the_cluster():
    files = [path.relative_to(ROOT) for name in ("ast_core", "pipeline", "jobs") for path in (ROOT / name).rglob("*")]
    kept = [str(path) for path in files if path.suffix in (".py", ".yaml", ".html", ".js", ".css")]
    assert len(kept) > 100
    assert list(filterfalse(is_packed(), kept)) == []


def test_commands_in_the_header_are_valid():
    text = CLUSTER.read_text(encoding="utf-8")
    header = re.sub(r"\\\n# +", "", "\n".join(line for line in text.splitlines() if line.startswith("#")))
    commands = dict(re.findall(r"ray job submit --working-dir \. -- python jobs/(\w+)\.py (.+)", header))
    assert set(commands) == {"prepare_audioset", "train"}
    for job, arguments in commands.items():
        args, rest = importlib.import_module(f"jobs.{job}").parser().parse_known_args(shlex.split(arguments))
        assert rest == []
        if job == "train":
            assert (args.recipe in train.recipe_names(), args.device) == (True, "cuda")
            num_gpus = cluster()["available_node_types"]["train"]["resources"]["GPU"]
            assert args.num_workers == (num_gpus, num_gpus)
