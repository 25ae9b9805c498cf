"""What a trained model costs: parameters, operations of a clip, and clips per second in inference on this machine."""

import time
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from ast_core.batch import Batch, Norm
from ast_core.errors import UserError, one_line
from ast_core.execution import for_device, set_attention
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from ast_core.step import predict
from pipeline.cluster import resources_of_nodes
from pipeline.ray_errors import user_errors_from_tasks
from pipeline.train import models
from pipeline.train.resources import worker_resources
from pipeline.train.settings import IN_PROCESS, TrainSettings
from pipeline.train.worker import out_of_memory

BATCH_CLIPS = {"cpu": 8, "cuda": 64}
"""Clips of a batch, if the recipe's micro_batch_size is not smaller. More would hardly be faster, and a large model
would take minutes on a CPU."""
MEASURED_S = 3.0
"""How long batches are measured; at least `MIN_BATCHES` are."""
MIN_BATCHES = 2


def model_costs(uri: str, settings: TrainSettings) -> dict[str, Any]:
    """`parameters`, `multiply_adds` of a clip, and `inference`: clips/s with the device, precision, batch and threads.

    The model at `uri` scores random features, without reading any. If Ray is there, it does so in a task; else, when
    nothing had to be trained, in this process.

    Raises:
        UserError: the model is damaged, or the memory is too small.
    """
    if not ray.is_initialized() or settings.num_workers == IN_PROCESS:
        use_gpu = settings.device != "cpu" and torch.cuda.is_available()
        return _model_costs(uri, use_gpu, settings.cpus_per_worker or torch.get_num_threads())
    use_gpu, threads = task_resources(settings)
    task = ray.remote(num_cpus=threads, num_gpus=int(use_gpu))(_model_costs)
    try:
        with user_errors_from_tasks():
            costs: dict[str, Any] = ray.get(task.remote(uri, use_gpu, threads))
    except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as err:
        raise UserError(f"the process that measured it died: {one_line(err)}") from err
    return costs


def task_resources(settings: TrainSettings) -> tuple[bool, int]:
    """Whether the task has a GPU, and its CPUs: those of a worker of the training, for which the cluster had room.

    If it asked for more, Ray could wait for them without end: for 4 CPUs beside the GPU of a machine that has 2.
    """
    of_worker = worker_resources(settings, resources_of_nodes())
    return of_worker.use_gpu, of_worker.cpus


def _model_costs(uri: str, use_gpu: bool, threads: int) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, config = models.read(uri)
        device = torch.device("cuda" if use_gpu else "cpu")
        recipe = for_device(config.recipe, device, trains=False)
        set_attention(model, device, recipe)
        most_clips = BATCH_CLIPS[device.type]
        batch_clips = min(most_clips, recipe.micro_batch_size or most_clips)
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
    except (RuntimeError, MemoryError) as err:
        if out_of_memory(err) is None:
            raise
        where, remedy = ("GPU", ", or with --device cpu") if use_gpu else ("machine", "")
        raise UserError(
            f"the {where} has too little memory to measure it; run the same command again when more is free{remedy}"
        ) from err
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
    with torch.no_grad():
        while num_batches < MIN_BATCHES or time.monotonic() - began_s < MEASURED_S:
            predict(model, batch, recipe=recipe, norm=norm).cpu()  # waits for the device
            num_batches += 1
            if num_batches == 0:
                began_s = time.monotonic()
    return num_batches * batch_clips / (time.monotonic() - began_s)
