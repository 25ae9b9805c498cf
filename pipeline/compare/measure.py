"""What a trained model costs: parameters, operations of a clip, and clips per second in inference on this machine."""

import time
from typing import Any

import ray
import torch

from ast_core.batch import Batch, Norm
from ast_core.execution import for_device, set_attention
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from ast_core.step import predict
from pipeline.ray_errors import user_errors_from_tasks
from pipeline.train import models
from pipeline.train.settings import CPUS_WITH_GPU

BATCH_CLIPS = {"cpu": 8, "cuda": 64}
"""Clips of a batch. More would hardly be faster, and a large model would take minutes on a CPU."""
MEASURED_S = 3.0
"""How long batches are measured; at least `MIN_BATCHES` are."""
MIN_BATCHES = 2


def model_costs(uri: str, *, device: str, cpus: int | None) -> dict[str, Any]:
    """`parameters`, `multiply_adds` of a clip, and `inference`: clips/s with the device, precision, batch and threads.

    The model at `uri` scores random features, without reading any. If Ray is there, it does so in a task; else, when
    nothing had to be trained, in this process.

    Args:
        device: cpu, cuda, or auto: cuda if there is a GPU.
        cpus: PyTorch's threads. None: all CPUs that Ray has, or PyTorch's own number.
    """
    if not ray.is_initialized():
        use_gpu = device != "cpu" and torch.cuda.is_available()
        return _model_costs(uri, use_gpu, cpus or torch.get_num_threads())
    has = ray.cluster_resources()
    use_gpu, threads = device != "cpu" and has.get("GPU", 0) >= 1, cpus or CPUS_WITH_GPU
    if not use_gpu:
        threads = cpus or int(max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]))
    task = ray.remote(num_cpus=threads, num_gpus=int(use_gpu))(_model_costs)
    with user_errors_from_tasks():
        costs: dict[str, Any] = ray.get(task.remote(uri, use_gpu, threads))
    return costs


def _model_costs(uri: str, use_gpu: bool, threads: int) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, config = models.read(uri)
        device = torch.device("cuda" if use_gpu else "cpu")
        recipe = for_device(config.recipe, device, trains=False)
        set_attention(model, device, recipe)
        batch_clips = BATCH_CLIPS[device.type]
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "multiply_adds": model.forward_flops() // 2,
            "inference": {
                "clips_per_s": inference_rate(model.to(device).eval(), recipe, config.norm, device, batch_clips),
                "device": torch.cuda.get_device_name(device) if use_gpu else "cpu",
                "precision": recipe.precision,
                "batch_clips": batch_clips,
                "threads": threads,
            },
        }
    finally:
        torch.set_num_threads(before)


def inference_rate(model: Tagger, recipe: Recipe, norm: Norm, device: torch.device, batch_clips: int) -> float:
    """Clips per second of `predict` on random features, after a batch that does not count."""
    num_frames, num_mel_bins = model.input_shape
    batch = Batch(
        fbank_BTM=norm.mean + norm.std * torch.randn(batch_clips, num_frames, num_mel_bins),
        num_frames_B=torch.full((batch_clips,), num_frames),
        target_BC=torch.zeros(batch_clips, model.label_dim),
        weight_B=torch.ones(batch_clips),
    ).to(device)
    num_batches, began_s = -1, 0.0
    with torch.inference_mode():
        while num_batches < MIN_BATCHES or time.monotonic() - began_s < MEASURED_S:
            predict(model, batch, recipe=recipe, norm=norm).cpu()  # waits for the device
            num_batches += 1
            if num_batches == 0:
                began_s = time.monotonic()
    return num_batches * batch_clips / (time.monotonic() - began_s)
