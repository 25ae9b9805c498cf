"""kubernetes/, tested without a cluster: KubeRay's schemas, Ray's reading of them, and that the parts agree.

`kubectl kustomize` puts the files together, as `kubectl apply -k` does; without kubectl the tests are skipped.

`fixtures/kuberay_rayjob.json.gz` is the schema of a RayJob v1, with a RayCluster's and the pods' inside, from
`ray-operator/config/crd/bases/ray.io_rayjobs.yaml` of KubeRay 1.7.0 (Apache License 2.0), without `status`.
"""

import copy
import gzip
import importlib
import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from jobs import train
from pipeline.cluster import NOT_ON_GPU_NODES
from pipeline.prepare import plan
from pipeline.tag.on_ray import GPU_READERS, READER_CPUS
from pipeline.versions import VERSION
from tests.autoscaler import nodes_for

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "kubernetes"
PAGE = ROOT / "docs" / "kubernetes.md"
CONTAINERFILE = (FOLDER / "Containerfile").read_text(encoding="utf-8")
JOBS = {"prepare": "prepare_audioset", "train": "train", "tag": "tag"}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which puts the files together")


@cache
def _rendered(folder: str) -> str:
    done = subprocess.run(["kubectl", "kustomize", FOLDER / folder], capture_output=True, text=True, check=True)
    return done.stdout


def objects(folder: str) -> dict[str, dict[str, Any]]:
    """What `kubectl apply -k` sends, by kind and name, for example `RayJob/train`."""
    found = yaml.safe_load_all(_rendered(folder))
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def ray_cluster() -> dict[str, Any]:
    return objects("cluster")["RayCluster/ast-ray"]


@cache
def validators() -> dict[str, jsonschema.Draft202012Validator]:
    """By kind, validators that refuse unknown fields. A real server drops such fields, or refuses them on request."""
    compressed = ROOT / "tests" / "fixtures" / "kuberay_rayjob.json.gz"
    job = strict(json.loads(gzip.decompress(compressed.read_bytes())))
    spec = job["properties"]["spec"]["properties"]["rayClusterSpec"]
    head = spec["properties"]["headGroupSpec"]["properties"]
    whole = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
    cluster = {"type": "object", "additionalProperties": False, "properties": {**whole, "spec": spec}}
    kinds = {"RayJob": job, "RayCluster": cluster, "Service": head["headService"], "pod": head["template"]}
    return {kind: jsonschema.Draft202012Validator(schema) for kind, schema in kinds.items()}


def strict(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes as a JSON schema that allows named properties only."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: strict(value) for key, value in schema.items()}
    is_object = "properties" in done and isinstance(done.get("type"), str)  # not a field that is called `properties`
    if is_object and not done.get("x-kubernetes-preserve-unknown-fields"):
        done.setdefault("additionalProperties", False)
    return done


def check(thing: dict[str, Any]) -> None:
    """Validate an object, raising ValidationError. Of a StatefulSet, we have the schema of its pods."""
    kind, checked = thing["kind"], thing
    if kind == "StatefulSet":
        kind, checked = "pod", thing["spec"]["template"]
    error = jsonschema.exceptions.best_match(validators()[kind].iter_errors(checked))
    if error is not None:
        raise error


@pytest.mark.parametrize("folder", ["cluster", "jobs"])
def test_kuberays_schema_accepts_the_manifests(folder: str):
    for thing in objects(folder).values():
        check(thing)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.workerGroupSpec", [], "Additional properties"),
        ("spec.autoscalerOptions.version", "2", "is not one of"),
        ("spec.authOptions.mode", "on", "is not one of"),
        ("spec.workerGroupSpecs.0.minReplicas", "none", "is not of type 'integer'"),
        ("spec.workerGroupSpecs.0.rayStartParams", None, "is not of type 'object'"),
        ("spec.headGroupSpec.template.spec.containers.0.imagee", "x", "Additional properties"),
        ("spec.headGroupSpec.template.spec.containers.0.securityContext.runAsNonroot", True, "Additional properties"),
        ("spec.headGroupSpec.template.spec.containers.0.resources.limits.memory", "16 GB", "does not match"),
        ("spec.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef", {"name": "x"}, "'key' is a required"),
    ],
)
def test_kuberays_schema_refuses_a_broken_manifest(path: str, value: Any, message: str):
    broken = copy.deepcopy(ray_cluster())
    *parents, key = path.split(".")
    inner: Any = broken
    for parent in parents:
        inner = inner[int(parent) if parent.isdigit() else parent]
    inner[key] = value
    with pytest.raises(jsonschema.ValidationError, match=message):
        check(broken)


def operator_complaints(thing: dict[str, Any]) -> list[str]:
    """Rules of KubeRay's operator that its schema does not have, as far as our manifests come near them."""
    spec, is_job = thing["spec"], thing["kind"] == "RayJob"
    cluster = spec.get("rayClusterSpec", {}) if is_job else spec
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]
    rules = {
        "a job without a cluster": is_job and not cluster,
        "a time to live without shutdown": is_job
        and spec.get("ttlSecondsAfterFinished", 0) > 0
        and not spec.get("shutdownAfterJobFinishes"),
        "a token needs rayVersion": "authOptions" in cluster and not cluster.get("rayVersion"),
        "autoscaler v2 restarts no pods": any(
            group.get("template", {}).get("spec", {}).get("restartPolicy", "Never") != "Never" for group in groups
        ),
        "resources are set twice": any(
            group.get("resources") and {"num-cpus", "num-gpus", "memory"} & group["rayStartParams"].keys()
            for group in groups
        ),
        "a name is no DNS label": not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", thing["metadata"]["name"]),
    }
    return [rule for rule, broken in rules.items() if broken]


def test_kuberays_operator_accepts_the_manifests():
    for thing in [ray_cluster(), *objects("jobs").values()]:
        assert operator_complaints(thing) == []


def test_each_job_brings_the_cluster_of_base_and_no_cluster_stays():
    things = objects("jobs")
    assert set(things) == {f"RayJob/{name}" for name in JOBS}
    spec = dict(ray_cluster()["spec"])
    del spec["gcsFaultToleranceOptions"]  # of no use to a job, whose driver is lost with its head
    for thing in things.values():
        assert thing["spec"]["rayClusterSpec"] == spec


def ray_pods() -> dict[str, dict[str, Any]]:
    """The groups of pods by name, `head` among them."""
    spec = ray_cluster()["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def test_all_pods_run_one_image_of_this_version():
    (named,) = re.findall(r"--tag (\S+)", CONTAINERFILE)
    (on_page,) = set(re.findall(r"registry\.example/\S*ast-ray:[\d.]+", PAGE.read_text(encoding="utf-8")))
    images = {submitter(name)["containers"][0]["image"] for name in JOBS}
    for group in ray_pods().values():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert container["envFrom"] == [{"secretRef": {"name": "ast-ray-storage"}}]
    assert images == {named} == {on_page}
    assert named.endswith(f":{VERSION}")
    assert re.findall(r"^USER (\d+)$", CONTAINERFILE, re.M) == re.findall(r"--uid (\d+)", CONTAINERFILE)


def submitter(job: str) -> dict[str, Any]:
    """The spec of the pod in which KubeRay runs `ray job submit`."""
    return objects("jobs")[f"RayJob/{job}"]["spec"]["submitterPodTemplate"]["spec"]


def test_all_pods_meet_the_restricted_pod_security_standard():
    """KubeRay copies the rights of its init container from Ray's container, and adds the autoscaler's container."""
    autoscaler = ray_cluster()["spec"]["autoscalerOptions"]
    head, *workers = (group["template"]["spec"] for group in ray_pods().values())
    redis = objects("cluster")["StatefulSet/ast-ray-redis"]["spec"]["template"]["spec"]
    for pod, more in ((head, [autoscaler]), *((pod, []) for pod in [*workers, redis, *map(submitter, JOBS)])):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *more]:
            rights = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == rights


def test_the_image_has_the_pinned_requirements_and_python_of_the_lock():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert re.findall(r"^ray(?:\[.*\])?==(\S+)", requirements, re.M) == [ray_cluster()["spec"]["rayVersion"]]
    assert "pip install --quiet --no-cache-dir --require-hashes -r /tmp/requirements.txt" in CONTAINERFILE
    (locked,) = set(re.findall(r"--python-version (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert set(re.findall(r"python(3\.\d+)", CONTAINERFILE)) == {locked}
    (default,) = re.findall(r"^ARG REQUIREMENTS=(\S+)$", CONTAINERFILE, re.M)
    (more,) = re.findall(r"--build-arg REQUIREMENTS=(\S+)\. ", CONTAINERFILE)
    assert (ROOT / more).exists()
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", CONTAINERFILE, re.M):
        assert (ROOT / source.replace("${REQUIREMENTS}", default)).exists()
        assert target in (source, "/tmp/requirements.txt")


def as_ray_reads(cluster: dict[str, Any]) -> AutoscalingConfig:
    """The settings of Ray's autoscaler beside a head of KubeRay."""
    named = copy.deepcopy(cluster)
    named["metadata"]["namespace"] = "default"
    return AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(named), skip_content_hash=True)


def test_the_head_takes_no_work_and_groups_start_from_none():
    scaling = as_ray_reads(ray_cluster())
    types = scaling.get_config("available_node_types")
    head = types.pop("headgroup")["resources"]
    assert (head["CPU"], head.get("GPU", 0)) == (0, 0)
    assert {name: settings["min_workers"] for name, settings in types.items()} == {"prepare": 0, "train": 0}
    assert ray_cluster()["spec"]["autoscalerOptions"]["version"] == "v2"
    assert 0 < scaling.get_config("idle_timeout_minutes") <= 60


def test_preparation_starts_cpu_pods_and_no_gpu_pods():
    scaling = as_ray_reads(ray_cluster())
    settings = scaling.get_config("available_node_types")["prepare"]
    for count, pods in ((1, 1), (10 * settings["resources"]["CPU"] * settings["max_workers"], settings["max_workers"])):
        assert nodes_for({"CPU": plan.STAGE_CPUS}, count, scaling, NOT_ON_GPU_NODES) == {"prepare": pods}


def test_the_workers_of_a_training_fit_on_one_gpu_pod():
    args = arguments("train")
    rank = {"CPU": train.CPUS_WITH_GPU, "GPU": 1}
    assert nodes_for(rank, args.num_workers[1], as_ray_reads(ray_cluster())) == {"train": 1}
    assert args.device == "cuda"


def test_the_workers_of_tagging_and_their_readers_fit_on_one_gpu_pod():
    args = arguments("tag")
    worker = {"CPU": GPU_READERS * READER_CPUS, "GPU": args.gpus_per_worker}
    assert nodes_for(worker, args.num_workers, as_ray_reads(ray_cluster())) == {"train": 1}
    assert args.device == "cuda"


def test_pods_have_the_memory_and_disk_that_their_work_needs():
    for name, group in ray_pods().items():
        resources = group["template"]["spec"]["containers"][0]["resources"]
        limits, requests = resources["limits"], dict(resources["requests"])
        assert int(requests.pop("ephemeral-storage").removesuffix("Gi")) >= 20
        assert requests == limits, f"the pods of {name} could be evicted, or start with less than Ray counts on"
        cpus, memory_gib = int(limits["cpu"]), int(limits["memory"].removesuffix("Gi"))
        assert memory_gib >= (16 if name == "head" else 2 * cpus)


def arguments(job: str) -> Any:
    """The options of a job's manifest, read by the job's own parser, which refuses unknown ones."""
    return _parsed(objects("jobs")[f"RayJob/{job}"]["spec"]["entrypoint"])


def _parsed(command: str) -> Any:
    python, script, *words = shlex.split(command)
    assert python == "python"
    (job,) = re.findall(r"^jobs/(\w+)\.py$", script)
    args, rest = importlib.import_module(f"jobs.{job}").parser().parse_known_args(words)
    assert rest == []
    return args


def test_the_commands_are_those_of_cluster_yaml():
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    header = re.sub(r"\\\n# +", "", "\n".join(line for line in text.splitlines() if line.startswith("#")))
    commands = dict(re.findall(r"ray job submit --working-dir \. -- (python jobs/(\w+)\.py .+)", header))
    assert set(commands.values()) == {"prepare_audioset", "train"}
    for command, job in commands.items():
        (name,) = (name for name, its in JOBS.items() if its == job)
        manifest = objects("jobs")[f"RayJob/{name}"]["spec"]["entrypoint"]
        assert _parsed(manifest.replace("REPLACE_ME", "bucket")) == _parsed(command)
    assert arguments("tag").checkpoint == [arguments("train").output]


def test_commands_and_files_of_the_page_exist():
    page = PAGE.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```\n(.*?)^```$", page, re.M | re.S)).replace("\\\n", " ")
    for folder in re.findall(r" -k (kubernetes/\S+)", code):
        assert (ROOT / folder / "kustomization.yaml").exists()
    assert set(re.findall(r"-l job=(\w+)", code)) == set(JOBS)
    secrets = dict(re.findall(r"kubectl create secret generic (\S+) (.+)", code))
    text = _rendered("cluster")
    assert set(re.findall(r"(?:secretRef|secretKeyRef):\s+(?:key: \S+\s+)?name: (\S+)", text)) == set(secrets)
    assert "--from-literal=password=" in secrets["ast-ray-redis"]


def test_no_manifest_has_a_key():
    for path in FOLDER.rglob("*.yaml"):
        assert "kind: Secret" not in path.read_text(encoding="utf-8")
