"""One rank of a training run: it builds the model, then trains and evaluates epoch by epoch and saves checkpoints.

A checkpoint contains everything that a resumed run needs. Random numbers depend only on (seed, epoch, step), so no
generator state is saved. An interrupted run continues with the very next batch, on any number of workers.

The file is long because `Run` is one class: each of its parts (steps, evaluation, checkpoints, stops) reads and changes
the same state of the rank, and all ranks must call the collective operations in the same order.
"""

import logging
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode, ValidationTaskConfig
from ray.train.torch import get_device, prepare_model
from torch import Tensor, nn

from ast_core.errors import DataError, UserError
from ast_core.execution import for_device, set_attention, set_execution
from ast_core.flops import utilisation
from ast_core.metrics import METRICS, TaggingMetrics, key_metrics
from ast_core.models.tagger import Tagger
from ast_core.schedule import learning_rate
from ast_core.step import MIN_LOSS_SCALE, make_optimizer, make_scaler, seed_network, share_buffers, train_step
from pipeline import storage
from pipeline.dataset import Clips
from pipeline.lease import LeaseLostError
from pipeline.memory_errors import out_of_memory
from pipeline.os_errors import explain
from pipeline.train import checkpoints, models, run_folder
from pipeline.train.async_validation import load_unevaluated
from pipeline.train.data.feed import TrainFeed
from pipeline.train.data.sampling import NO_PARTNER
from pipeline.train.data.shard_cache import ShardCache
from pipeline.train.evaluation.epoch_results import EpochResults
from pipeline.train.evaluation.run_report import write_run_report
from pipeline.train.evaluation.scoring import evaluate, score_metrics
from pipeline.train.metrics_log import RunLog, delete_leftovers, finite_or_null, write_summary
from pipeline.train.worker_config import TrainJob, read_initial_model, record_stop, stopped_json

logger = logging.getLogger(__name__)

LOOK_FOR_PREEMPTION_EVERY_S = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))
"""Seconds between checks for a preemption notice: as often as Ray's controller, by the same environment variable.

A check synchronises all ranks. Clouds give notice 30 s or more ahead.
"""

REPORT_SHARE = 0.05
"""Largest share of the time for the reports during training. A report takes about half a second."""


@dataclass
class Progress:
    """The state of a run apart from model and optimiser."""

    epochs_done: int = 0
    steps_done: int = 0
    """Steps of the epoch in progress."""
    loss_sum: float = 0.0
    """Sum of the global mean losses of these steps."""
    averaged: dict[str, Tensor] = field(default_factory=dict)
    """Sum of the weights of epochs wa_start … wa_end so far. Only rank 0 has it, until a resume."""
    num_averaged: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0
    epoch_loss: float | None = None
    """Mean loss of the last complete epoch."""


class NonFiniteError(Exception):
    """A loss or a weight is not finite, or gradients never are. All ranks raise it at the same step."""


class StoppedError(Exception):
    """Asynchronous validation ended the run. All ranks raise it at the same step."""


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of Ray Train on every rank; `config` is a TrainJob as a dict."""
    job = TrainJob(**config)
    _shorten_errors_on_the_terminal()
    if storage.exists(stopped_json(job.run)):  # an error of any rank ended the run, and Ray restarted the ranks
        return
    logging.getLogger().setLevel(logging.WARNING)  # Ray logs each report in full at INFO
    logging.getLogger("pipeline").setLevel(logging.INFO)
    torch.set_num_threads(job.threads)
    try:
        run = Run(job)
        run.train()
    except NonFiniteError as err:
        # All ranks end here. If the error left this function, Ray would restart from the checkpoint and fail again.
        if run.log is not None:
            record_stop(job.run, err)
            run.log.close(failed=True)
    except StoppedError:
        if run.log is not None:
            run.log.close(failed=True)
    except LeaseLostError:
        raise  # RUN is another job's, which must not find stopped.json
    except UserError as err:
        # Perhaps only this rank has the error. The others find stopped.json when Ray restarts them.
        record_stop(job.run, err)
        raise
    except (RuntimeError, MemoryError) as err:
        if (line := out_of_memory(err)) is None:
            raise
        error = UserError(line)
        record_stop(job.run, error)
        raise error from err


def _shorten_errors_on_the_terminal() -> None:
    """Show one line for an error that the user can act on, such as a full disk or an S3 that is away.

    Ray Train logs a traceback for each attempt. Its log files, which come before the terminal, keep it.
    """
    for handler in logging.getLogger("ray.train").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    error = (record.exc_info or sys.exc_info())[1]  # some lines hold the traceback as text
    line = str(error) if isinstance(error, UserError) else explain(error)
    if line is not None and record.levelno >= logging.ERROR:
        record.msg, record.args, record.exc_info, record.exc_text = f"this worker fails: {line}", (), None, None
    return True


class Run:
    """One rank of a training run."""

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.job = job
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        # In one process, `get_device` returns the GPU of the machine although the run uses none.
        self.device = get_device() if job.use_gpu else torch.device("cpu")
        model, self.config = read_initial_model(job)
        self.recipe, self.norm = for_device(self.config.recipe, self.device), self.config.norm
        dataset, train_clips, self.eval_clips = job.open_data()
        self.labels = dataset.labels
        self.results = EpochResults(job.run, self.config, train_clips, self.eval_clips)
        self.cache = ShardCache(job.cache_dir, job.cache_bytes) if job.cache_dir else None
        self.feed = TrainFeed(
            train_clips,
            self.recipe,
            len(self.labels),
            self.rank,
            self.world_size,
            self.cache,
            features=self.config.features,
        )
        computed = set_execution(model, self.device, self.recipe)
        if self.rank == 0:
            job.check_lock()
            run_folder.record_computed(job.run, computed)
        self.model = prepare_model(model, move_to_device=self.device)
        if self.device.type == "cuda":  # for `_memory_gb`: this process may have trained another run
            torch.cuda.reset_peak_memory_stats(self.device)
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.scaler = make_scaler(self.recipe, self.device)
        self.progress = Progress()
        self._checkpointed_s = self._looked_s = self._next_report_s = time.monotonic()
        self._saved_for_preemption = False
        self.log: RunLog | None = None
        """Only rank 0 has one."""
        if context.get_local_rank() == 0:
            delete_leftovers(checkpoints.upload_prefix(job.run))
        self._resume()

    @property
    def bare_model(self) -> Tagger:
        model = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        assert isinstance(model, Tagger)
        return model

    def train(self) -> None:
        progress = self.progress
        steps_done = progress.epochs_done * self.feed.steps_per_epoch + progress.steps_done
        if self.rank == 0:
            self.log = RunLog(self.job.run, steps_done, self.job.mlflow_uri, self.config.recipe.to_dict())
        if not self.job.async_validation:
            self._evaluate_missing()  # the run may have used asynchronous validation before
        while progress.epochs_done < self.recipe.epochs and not self._has_stalled():
            epoch = progress.epochs_done + 1
            loss = self._train_epoch(epoch)
            self._average(epoch)
            if not self.job.async_validation:
                scores = self._evaluate(self.eval_clips)
                if scores is not None:
                    self.job.check_lock()
                    self.results.record(epoch, loss, scores, self.bare_model.state_dict())
            progress.epochs_done, progress.steps_done, progress.loss_sum, progress.epoch_loss = epoch, 0, 0.0, loss
            self._log_epochs()
            self._checkpoint(validation=self._validation_task(epoch, loss))
            if self.log is not None:
                self._delete_old_sums()
                if progress.epochs_done < self.recipe.epochs:  # the command writes the last one
                    self._write_report()
        if self.job.async_validation:
            ray.train.get_all_reported_checkpoints()  # waits for their validation
            if self._from_rank_0(self.rank == 0 and storage.exists(stopped_json(self.job.run))):
                raise StoppedError
            self._evaluate_missing()
        averaged = self._evaluate_averaged()
        if self.log is not None:
            self.job.check_lock()
            self.log.close()  # before the summary, whose existence means that the run is finished
            self._finish(averaged)

    def _weights(self) -> Iterator[Tensor]:
        """The parameters, and the statistics of batch normalisation."""
        yield from self.model.parameters()
        yield from (buffer for buffer in self.model.buffers() if buffer.is_floating_point())

    def _delete_old_sums(self) -> None:
        """Delete sums of scores that no resumed run needs. Training may be many short epochs ahead of its uploads."""
        oldest = checkpoints.oldest_epoch(self.job.run)
        if oldest is None and not self.job.saves_checkpoints:
            oldest = self.progress.epochs_done
        if oldest is not None:
            self.results.delete_sums(oldest)

    def _write_report(self) -> None:
        """Write the report so far, if the last one is long enough ago. Training continues if this fails."""
        began_s = time.monotonic()
        if began_s < self._next_report_s:
            return
        try:
            write_run_report(self.job.run)
        except Exception as err:
            if line := explain(err):
                logger.warning(f"the report could not be written: {line}")
            else:
                logger.exception("the report could not be written")
        self._next_report_s = began_s + (time.monotonic() - began_s) / REPORT_SHARE

    def _has_stalled(self) -> bool:
        """Whether the best epoch is `patience` epochs or more ago."""
        patience = self.recipe.patience
        if patience is None:
            return False
        since_best = self.results.epochs_since_best(self.progress.epochs_done) if self.rank == 0 else 0
        return self._from_rank_0(since_best) >= patience

    def _train_epoch(self, epoch: int) -> float:
        """Train the remaining steps of an epoch. Returns the mean loss over the whole epoch, on every rank."""
        self.model.train()
        steps_per_epoch, progress = self.feed.steps_per_epoch, self.progress
        losses: list[Tensor] = []
        num_clips, began_s = 0, time.monotonic()
        for item in self.feed.epoch(epoch, self.device, progress.steps_done):
            step = (epoch - 1) * steps_per_epoch + item.step
            lr = learning_rate(self.recipe, step, steps_per_epoch=steps_per_epoch)
            seed_network((self.recipe.seed, step, self.rank))
            loss = train_step(
                self.model,
                self.optimizer,
                item.batch,
                item.augmentations,
                recipe=self.recipe,
                norm=self.norm,
                lr=lr,
                num_clips_global=item.num_clips_global,
                world_size=self.world_size,
                patchout=item.patchout,
                scaler=self.scaler,
            )
            losses.append(loss)
            num_clips += item.num_clips_global
            is_last = item.step + 1 == steps_per_epoch
            if (item.step + 1) % self.job.log_every_steps and not is_last:
                continue
            mean_loss, checkpoint_is_due, look_is_due = self._end_interval(epoch, item.step, losses)
            elapsed_s, wait_s = time.monotonic() - began_s, self.feed.waits.wait_s
            progress.train_s += elapsed_s
            progress.wait_s += wait_s
            if self.log is not None:
                values: dict[str, Any] = {"loss": mean_loss, "lr": lr, "clips_per_s": num_clips / elapsed_s}
                values |= {"data_wait_share": wait_s / elapsed_s, "memory_gb": self._memory_gb()}
                if self.scaler is not None:
                    values["loss_scale"] = self.scaler.get_scale()
                values["mfu"] = utilisation(
                    values["clips_per_s"], self.bare_model, self.recipe, self.device, self.world_size
                )
                self.log.step(epoch=epoch, step=step + 1, values=values)
                logger.info(
                    f"epoch {epoch}  step {item.step + 1}/{steps_per_epoch}  loss {mean_loss:.4f}  lr {lr:.2e}  "
                    f"{values['clips_per_s']:.1f} clips/s  waited {wait_s / elapsed_s:.1%}"
                    + (f"  MFU {values['mfu']:.2f}" if values["mfu"] is not None else "")
                )
            if not is_last:
                if checkpoint_is_due:
                    self._checkpoint()
                elif look_is_due and self._is_new_preemption():
                    logger.info("a node will be preempted: saving a checkpoint")
                    self._checkpoint(CheckpointUploadMode.SYNC)
            losses, num_clips, self.feed.waits.wait_s, began_s = [], 0, 0.0, time.monotonic()
        if self.world_size > 1:
            share_buffers(self.bare_model)
        return progress.loss_sum / steps_per_epoch

    def _end_interval(self, epoch: int, last_step: int, losses: Sequence[Tensor]) -> tuple[float, bool, bool]:
        """Reduce the losses of the steps up to `last_step` of the epoch over all ranks, and update the progress.

        Returns:
            The steps' mean loss, whether a checkpoint is due, and whether to check for a preemption notice, both by
            rank 0's clock.

        Raises:
            NonFiniteError: a loss, or a weight after the last step, is not finite; raised on every rank. The clips of
                the first such step are in RUN/nonfinite.json. Or gradients of fp16 overflow at every step.
            StoppedError: asynchronous validation ended the run; raised on every rank.
        """
        now_s = time.monotonic()
        looks = self.rank == 0 and now_s - self._looked_s >= LOOK_FOR_PREEMPTION_EVERY_S
        looks_for_stop = self.job.async_validation and (looks or last_step + 1 == self.feed.steps_per_epoch)
        flags = [
            self.rank == 0 and now_s - self._checkpointed_s >= self.job.checkpoint_every_s,
            looks,
            self.rank == 0 and looks_for_stop and storage.exists(stopped_json(self.job.run)),
            # Without this check, broken weights would be saved, and every resumed run would fail on them.
            not torch.stack([weight.isfinite().all() for weight in self._weights()]).all(),
            # Each overflow skips the update and halves the scale. The loss stays finite, and nothing is learnt.
            self.scaler is not None and self.scaler.get_scale() < MIN_LOSS_SCALE,
        ]
        reduced = torch.cat([torch.stack(list(losses)), torch.tensor(flags, dtype=torch.float32, device=self.device)])
        if self.world_size > 1:
            dist.all_reduce(reduced)
        global_losses, flags = reduced[: len(losses)].cpu().numpy(), reduced[len(losses) :].tolist()
        checkpoint_is_due, look_is_due, is_stopped, is_broken, overflows = flags
        if not np.isfinite(global_losses).all():
            step = last_step + 1 - len(losses) + int(np.argmin(np.isfinite(global_losses)))
            raise NonFiniteError(self._write_nonfinite("the loss of", epoch, step))
        if is_broken:
            raise NonFiniteError(self._write_nonfinite("a weight after", epoch, last_step))
        if overflows:
            raise NonFiniteError(
                "fp16 gradients overflow at every step: use precision bf16 or fp32, with another --output"
            )
        if is_stopped:
            raise StoppedError
        self.progress.steps_done = last_step + 1
        self.progress.loss_sum += float(global_losses.astype(np.float64).sum())
        if look_is_due:
            self._looked_s = now_s
        return float(global_losses.mean()), bool(checkpoint_is_due), bool(look_is_due)

    def _write_nonfinite(self, what: str, epoch: int, step: int) -> str:
        """Write the clips of a step (counted from 0) to RUN/nonfinite.json, on rank 0. Returns the error's text."""
        uri = storage.join(self.job.run, "nonfinite.json")
        if self.rank == 0:
            order, batch_size = self.feed.order(epoch), self.recipe.batch_size
            names, batch = self.feed.clips.clip_id, slice(step * batch_size, (step + 1) * batch_size)
            clips, partners = order.clip[batch], order.partner[batch]
            mixed_in = [None if p == NO_PARTNER else names[int(p)].as_py() for p in partners]
            storage.write_json(
                uri,
                {"epoch": epoch, "step": step + 1, "clip_id": names.take(clips).to_pylist(), "mixed_with": mixed_in},
            )
        return (
            f"{what} epoch {epoch}, step {step + 1} is not finite; its clips are in {uri}. "
            "Lower lr, set grad_clip, or use precision fp32, with another --output"
        )

    def _is_new_preemption(self) -> bool:
        """Whether there is a preemption notice that was not answered yet. All ranks must call this together."""
        is_noticed = ray.train.get_preemption_info() is not None
        is_new, self._saved_for_preemption = is_noticed and not self._saved_for_preemption, is_noticed
        return is_new

    def _memory_gb(self) -> float:
        """Peak memory of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _from_rank_0(self, value: float) -> float:
        if self.world_size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def _evaluate(self, clips: Clips) -> np.ndarray | None:
        recipe = for_device(self.config.recipe, self.device, trains=False)
        set_attention(self.bare_model, self.device, recipe)
        try:
            return evaluate(
                self.bare_model,
                clips,
                recipe=recipe,
                norm=self.norm,
                num_classes=len(self.labels),
                device=self.device,
                rank=self.rank,
                world_size=self.world_size,
                cache=self.cache,
            )
        finally:
            set_attention(self.bare_model, self.device, self.recipe)

    def _evaluate_missing(self) -> None:
        """Evaluate and log, on the ranks, epochs whose asynchronous validation failed or was not requested.

        If the weights of such an epoch are gone, it is left out. Only rank 0 reads weights, so that all ranks agree.
        """
        last = self.progress.epochs_done
        first = int(self._from_rank_0(self.results.first_missing() if self.rank == 0 else 0))
        if first > last:
            self._log_epochs()
            return
        own = {name: value.clone() for name, value in self.bare_model.state_dict().items()}
        for epoch in range(first, last + 1):
            found = self._unevaluated(epoch, own) if self.rank == 0 else None
            if self._from_rank_0(found is None):
                if self.rank == 0:
                    self.job.check_lock()
                    self.results.skip(epoch)
                continue
            loss, state = found or (None, None)
            self._load_on_all_ranks(state)
            scores = self._evaluate(self.eval_clips)
            if scores is not None:
                self.job.check_lock()
                self.results.record(epoch, loss, scores, self.bare_model.state_dict())
        self.bare_model.load_state_dict(own)
        self._log_epochs()

    def _unevaluated(self, epoch: int, own: Mapping[str, Tensor]) -> tuple[float | None, Mapping[str, Tensor]] | None:
        """The loss and weights of an epoch that has no record; `own` are those in memory. None if they are gone."""
        if epoch == self.progress.epochs_done and not self.progress.steps_done:
            return self.progress.epoch_loss, own
        return load_unevaluated(self.job.run, epoch)

    def _load_on_all_ranks(self, state: Mapping[str, Tensor] | None) -> None:
        """Load the weights that rank 0 gives; the other ranks give None."""
        if state is not None:
            self.bare_model.load_state_dict(state)
        if self.world_size > 1:
            for value in self.bare_model.state_dict().values():
                dist.broadcast(value, src=0)

    def _validation_task(self, epoch: int, loss: float) -> ValidationTaskConfig | bool:
        return ValidationTaskConfig({"epoch": epoch, "loss": loss}) if self.job.async_validation else False

    def _log_epochs(self) -> None:
        """Log, on rank 0, the epochs that are evaluated and not logged yet."""
        if self.log is None:
            return
        for record in self.results.records(self.progress.epochs_done):
            if record["epoch"] in self.log.epochs:
                continue
            figures = {name: record.get(name) for name in ("loss", *METRICS)}
            ensemble = {f"running_ensemble_{name}": value for name, value in record["running_ensemble"].items()}
            step = record["epoch"] * self.feed.steps_per_epoch
            self.log.epoch(epoch=record["epoch"], step=step, values=figures | ensemble)
            titles = {"loss": "loss"} | {metric.name: metric.title for metric in key_metrics()}
            shown = [
                f"{title} {float('nan') if figures[name] is None else figures[name]:.4f}"
                for name, title in titles.items()
            ]
            best = "  (best)" if record["is_best"] else ""
            logger.info("  ".join([f"epoch {record['epoch']}/{self.recipe.epochs}", *shown]) + best)

    def _average(self, epoch: int) -> None:
        """Add the weights of an epoch that the recipe averages to the sum, on rank 0."""
        progress, recipe = self.progress, self.recipe
        if recipe.wa_start is None or recipe.wa_end is None or not recipe.wa_start <= epoch <= recipe.wa_end:
            return
        progress.num_averaged += 1
        if self.rank == 0:
            for name, value in self.bare_model.state_dict().items():
                value = value.detach().cpu()
                progress.averaged[name] = (
                    progress.averaged[name] + value if name in progress.averaged else value.clone()
                )

    def _evaluate_averaged(self) -> TaggingMetrics | None:
        """Load the averaged weights on every rank and evaluate them; None if no epoch was averaged."""
        num_averaged = self.progress.num_averaged
        if not num_averaged:
            return None
        averaged = {name: total / num_averaged for name, total in self.progress.averaged.items()}
        self._load_on_all_ranks(averaged if self.rank == 0 else None)
        if self.rank == 0:
            self.job.check_lock()
            models.save(storage.join(self.job.run, "averaged"), self.bare_model.state_dict(), self.config)
        scores = self._evaluate(self.eval_clips)
        return None if scores is None else score_metrics(scores, self.eval_clips)

    def _finish(self, averaged: TaggingMetrics | None) -> None:
        progress, records = self.progress, self.results.records(self.progress.epochs_done)
        best = self.results.best()
        assert best is not None
        num_clips = len(self.feed.clips) * progress.epochs_done
        summary = {
            "best_epoch": best["epoch"],
            **{name: best.get(name) for name in METRICS},
            "averaged": None if averaged is None else finite_or_null(averaged.scalars()),
            "running_ensemble": records[-1]["running_ensemble"],
            "epochs": progress.epochs_done,
            "world_size": self.world_size,
            "clips_per_s": num_clips / progress.train_s,
            "train_s": progress.train_s,
            "data_wait_share": progress.wait_s / progress.train_s,
        }
        checkpoints.delete_unlisted(self.job.run)
        write_summary(self.job.run, summary)

    def _checkpoint(
        self,
        mode: CheckpointUploadMode = CheckpointUploadMode.ASYNC,
        validation: ValidationTaskConfig | bool = False,
    ) -> None:
        """Report on every rank, on rank 0 with the state. By default it is uploaded while training continues."""
        progress = self.progress
        metrics: dict[str, Any] = {"epochs_done": progress.epochs_done, "steps_done": progress.steps_done}
        checkpoint = None
        if self.log is not None:
            self.job.check_lock()
            self.log.flush()  # a resumed run continues from these records
            checkpoint = checkpoints.make(self.job.run, self._state()) if self.job.saves_checkpoints else None
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=checkpoints.new_name(progress.epochs_done, progress.steps_done),
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
            validation=validation if checkpoint else False,
        )
        self._checkpointed_s = time.monotonic()

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.bare_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "progress": {name: getattr(self.progress, name) for name in vars(self.progress)},
        }

    def _resume(self) -> None:
        """Restore the latest undamaged checkpoint, on every rank the same one."""
        known = checkpoints.known(self.job.unlisted_checkpoints)
        state = checkpoints.load_latest(known)
        self._check_same_checkpoint(state)
        if not known:
            return
        if state is None:
            raise DataError(
                f"every checkpoint in {self.job.run} is damaged; delete its checkpoints folder to train again from "
                "the start"
            )
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if self.rank == 0:
            done = self.progress
            at = f", step {done.steps_done} of the next" if done.steps_done else ""
            ranks = "1 worker" if self.world_size == 1 else f"{self.world_size} workers"
            logger.info(f"resuming after epoch {done.epochs_done}{at}, on {ranks}")

    def _check_same_checkpoint(self, state: Mapping[str, Any] | None) -> None:
        """Compare the checkpoint that this rank has read with the other ranks'. All ranks must call this together.

        Each rank reads by itself, and skips what it finds damaged: on one rank a download may have been cut off.

        Raises:
            ConnectionError: they differ; raised on every rank, and Ray restarts them.
        """
        if self.world_size == 1:
            return
        progress = {"epochs_done": -1, "steps_done": -1} if state is None else state["progress"]
        done = torch.tensor([progress["epochs_done"], progress["steps_done"]], device=self.device)
        bounds = torch.cat([done, -done])
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        if not torch.equal(bounds[:2], -bounds[2:]):  # the largest values are the smallest ones too
            raise ConnectionError("some ranks could not read the checkpoint that others have read")
