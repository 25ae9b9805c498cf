"""Asynchronous validation: an epoch is evaluated in a separate worker while the next epoch trains."""

from typing import Any

import torch
from ray.train import Checkpoint
from torch import Tensor

from ast_core.errors import UserError
from ast_core.execution import for_device, set_attention
from pipeline.lease import LeaseLostError
from pipeline.train import checkpoints
from pipeline.train.checkpoints import DamagedStateError, load_state
from pipeline.train.data.shard_cache import ShardCache
from pipeline.train.evaluation.epoch_results import EpochResults, defer, read_deferred
from pipeline.train.evaluation.scoring import evaluate
from pipeline.train.worker_config import TrainJob, read_initial_model, record_stop

RETRIED = (OSError, DamagedStateError)
"""Errors after which Ray repeats a validation, up to three times: storage failed, or a download was cut off.

After any other error, and after the last time, Ray no longer keeps the epoch's checkpoint.
"""


def validate_checkpoint(checkpoint: Checkpoint, job: dict[str, Any], epoch: int, loss: float) -> dict[str, Any]:
    """Evaluate an epoch's checkpoint: Ray Train's validation function.

    Ray runs one validation at a time, in the order of the epochs. After a restart it runs again what was not finished.
    It repeats a validation only for the errors in RETRIED. After any other error the next epoch's validation evaluates
    the missed epoch first, or the ranks do so at the end. An error that the user can fix ends the run.
    """
    train_job = TrainJob(**job)
    train_job.check_lock()
    torch.set_num_threads(train_job.threads)
    with checkpoint.as_directory() as folder:
        state = load_state(folder)["model"]
    try:
        return {"headline": _evaluate_up_to(train_job, epoch, loss, state)["headline"]}
    except LeaseLostError:
        raise
    except Exception as err:
        defer(train_job.run, epoch, loss, state)  # Ray may delete the checkpoint now
        if isinstance(err, UserError):
            record_stop(train_job.run, err)
        raise


def _evaluate_up_to(job: TrainJob, epoch: int, loss: float, state: dict[str, Tensor]) -> dict[str, Any]:
    """Evaluate and record an epoch, after all earlier epochs that have no record. Returns the epoch's record."""
    device = torch.device("cuda" if job.use_gpu else "cpu")
    model, config = read_initial_model(job)
    recipe = for_device(config.recipe, device, trains=False)
    set_attention(model, device, recipe)
    model.to(device)
    _, train_clips, clips = job.open_data()
    results = EpochResults(job.run, config, train_clips, clips)
    cache = ShardCache(job.cache_dir, job.cache_bytes) if job.cache_dir else None

    def evaluate_epoch(epoch: int, loss: float | None, state: dict[str, Tensor]) -> dict[str, Any]:
        model.load_state_dict(state)
        scores = evaluate(
            model, clips, recipe=recipe, norm=config.norm, num_classes=len(config.labels), device=device, cache=cache
        )
        assert scores is not None
        job.check_lock()
        return results.record(epoch, loss, scores, state)

    for earlier in range(results.first_missing(), epoch):
        found = load_unevaluated(job.run, earlier)
        if found is None:
            job.check_lock()
            results.skip(earlier)
        else:
            evaluate_epoch(earlier, *found)
    return evaluate_epoch(epoch, loss, state)


def load_unevaluated(run: str, epoch: int) -> tuple[float | None, dict[str, Tensor]] | None:
    """The loss and weights of an epoch that has no record; None if neither deferred weights nor a checkpoint exist.

    What is damaged is read a second time, because the first download may have been cut off.
    """
    for _ in range(2):
        if found := read_deferred(run, epoch) or checkpoints.load_end_of_epoch(run, epoch):
            return found
    return None
