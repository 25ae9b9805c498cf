"""What one rank does: build, train an epoch, evaluate, checkpoint, and again.

All that a resumed run needs lies in the checkpoint; the order of the samples is a function of (seed, epoch), so a run
that was cut off goes on as if nothing had happened from the last whole epoch.
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model
from torch import Tensor, nn

from ast_core.metrics import TaggingMetrics
from ast_core.schedule import learning_rate
from ast_core.step import make_optimizer, set_execution, train_step
from pipeline import storage
from pipeline.dataset import Clips, PreparedDataset
from pipeline.train import models
from pipeline.train.evaluation import class_counts, evaluate, headline, score_metrics
from pipeline.train.feed import TrainFeed
from pipeline.train.report import RunLog, finite_or_null, per_class_csv, write_summary

logger = logging.getLogger(__name__)
LOG_EVERY_STEPS = 20
STATE_FILE = "state.pt"


@dataclass(frozen=True)
class TrainJob:
    """What the driver hands to every rank."""

    data: str
    train_splits: list[str]
    eval_splits: list[str]
    run: str
    """Holds `initial`, the model to start from, whose config is the run's."""
    threads: int


@dataclass
class Progress:
    """The state of a run between two epochs, but for model and optimiser. What evaluation adds, rank 0 alone has."""

    epochs_done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record an epoch."""
    averaged: dict[str, Tensor] = field(default_factory=dict)
    """Sum of the weights of epochs wa_start … wa_end so far."""
    score_sum: Tensor | None = None
    """Sum of the epochs' evaluation scores: the running ensemble."""
    train_s: float = 0.0
    wait_s: float = 0.0


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of Ray Train on every rank; `config` is a TrainJob as a dict."""
    job = TrainJob(**config)
    logging.getLogger().setLevel(logging.WARNING)  # Ray repeats each report in full
    logging.getLogger("pipeline").setLevel(logging.INFO)
    torch.set_num_threads(job.threads)
    Run(job).train()


class Run:
    """One rank's part of a training run."""

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.job = job
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        model, self.config = models.read(storage.join(job.run, "initial"))
        self.recipe, self.norm = self.config.recipe, self.config.norm
        dataset = PreparedDataset.open(job.data)
        self.labels = dataset.labels
        self.eval_clips = dataset.clips(job.eval_splits)
        self.feed = TrainFeed(
            dataset.clips(job.train_splits), self.recipe, len(self.labels), self.rank, self.world_size
        )
        set_execution(model, self.device, self.recipe)
        self.model = prepare_model(model)
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.progress = Progress()
        self._resume()

    @property
    def bare_model(self) -> nn.Module:
        return self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model

    def train(self) -> None:
        log = RunLog(self.job.run, self.progress.epochs_done * self.feed.steps_per_epoch) if self.rank == 0 else None
        for epoch in range(self.progress.epochs_done + 1, self.recipe.epochs + 1):
            loss = self._train_epoch(epoch, log)
            scores = self._evaluate(self.eval_clips)
            if log is not None and scores is not None:
                self._note_epoch(epoch, loss, scores, log)
            self.progress.epochs_done = epoch
            self._checkpoint()
        averaged = self._evaluate_averaged()
        if log is not None:
            self._finish(averaged)
            log.close()

    def _train_epoch(self, epoch: int, log: RunLog | None) -> float:
        """Returns the mean loss over the epoch, on every rank."""
        self.model.train()
        recipe, steps_per_epoch = self.recipe, self.feed.steps_per_epoch
        totals = torch.zeros(2, device=self.device)  # this rank's loss and 1, summed over steps
        logged, began_s = totals.clone(), time.monotonic()
        logged_s, logged_clips, clips = began_s, 0, 0
        for i, item in enumerate(self.feed.epoch(epoch, self.device)):
            step = (epoch - 1) * steps_per_epoch + i
            lr = learning_rate(recipe, step, steps_per_epoch=steps_per_epoch)
            loss = train_step(
                self.model,
                self.optimizer,
                item.batch,
                item.augmentation,
                recipe=recipe,
                norm=self.norm,
                lr=lr,
                num_clips_global=item.num_clips_global,
                world_size=self.world_size,
            )
            totals += torch.stack([loss, torch.ones_like(loss)])
            clips += item.num_clips_global
            if (i + 1) % LOG_EVERY_STEPS == 0 or i + 1 == steps_per_epoch:
                mean_loss = self._mean_over_ranks(totals - logged)
                if log is not None:
                    rate = (clips - logged_clips) / (time.monotonic() - logged_s)
                    log.step(epoch=epoch, step=step + 1, values={"loss": mean_loss, "lr": lr, "clips_per_s": rate})
                    at = f"epoch {epoch}  step {i + 1}/{steps_per_epoch}"
                    logger.info(f"{at}  loss {mean_loss:.4f}  lr {lr:.2e}  {rate:.1f} clips/s")
                logged, logged_s, logged_clips = totals.clone(), time.monotonic(), clips
        self.progress.train_s += time.monotonic() - began_s
        self.progress.wait_s += self.feed.waits.wait_s
        self.feed.waits.wait_s = 0.0
        return self._mean_over_ranks(totals)

    def _mean_over_ranks(self, loss_and_steps: Tensor) -> float:
        """Mean loss a step; a rank's loss is its part of a global mean, so parts add up."""
        total = loss_and_steps.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        mean = float(total[0] / total[1]) * self.world_size
        if not np.isfinite(mean):
            raise FloatingPointError("the loss is not finite: lower lr, or use precision fp32")
        return mean

    def _evaluate(self, clips: Clips) -> np.ndarray | None:
        return evaluate(
            self.bare_model,
            clips,
            recipe=self.recipe,
            norm=self.norm,
            num_classes=len(self.labels),
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _note_epoch(self, epoch: int, loss: float, scores: np.ndarray, log: RunLog) -> None:
        """Rank 0, after an epoch: metrics, running ensemble, averaged weights, best model."""
        progress, recipe = self.progress, self.recipe
        metrics = score_metrics(scores, self.eval_clips)
        progress.score_sum = torch.from_numpy(scores) + (0 if progress.score_sum is None else progress.score_sum)
        ensemble = score_metrics(progress.score_sum.numpy() / epoch, self.eval_clips)
        is_best = all(headline(metrics, recipe) > record["headline"] for record in progress.history)
        record = {"epoch": epoch, "headline": headline(metrics, recipe), "loss": loss} | metrics.scalars()
        progress.history.append(record | {"running_ensemble": ensemble.scalars()})
        if recipe.wa_start is not None and recipe.wa_end is not None and recipe.wa_start <= epoch <= recipe.wa_end:
            for name, value in self.bare_model.state_dict().items():
                value = value.detach().cpu()
                progress.averaged[name] = (
                    progress.averaged[name] + value if name in progress.averaged else value.clone()
                )
        if is_best:
            self._save_model("best", self.bare_model.state_dict())
            self._write_per_class(metrics)
        values = (
            {"loss": loss} | metrics.scalars() | {f"running_ensemble_{k}": v for k, v in ensemble.scalars().items()}
        )
        log.epoch(epoch=epoch, step=epoch * self.feed.steps_per_epoch, values=values)
        log.flush()
        logger.info(
            f"epoch {epoch}/{recipe.epochs}  loss {loss:.4f}  mAP {metrics.map:.4f}  AUC {metrics.mauc:.4f}  "
            f"accuracy {metrics.accuracy:.4f}{'  (best)' if is_best else ''}"
        )

    def _evaluate_averaged(self) -> TaggingMetrics | None:
        """Load the averaged weights on every rank and evaluate them; None where the recipe does not average."""
        recipe = self.recipe
        if recipe.wa_start is None or recipe.wa_end is None:
            return None
        state = self.bare_model.state_dict()
        if self.rank == 0:
            num_epochs = recipe.wa_end - recipe.wa_start + 1
            self.bare_model.load_state_dict(
                {name: total / num_epochs for name, total in self.progress.averaged.items()}
            )
            self._save_model("averaged", state)
        if self.world_size > 1:
            for value in state.values():
                dist.broadcast(value, src=0)
        scores = self._evaluate(self.eval_clips)
        return None if scores is None else score_metrics(scores, self.eval_clips)

    def _finish(self, averaged: TaggingMetrics | None) -> None:
        progress = self.progress
        best = max(progress.history, key=lambda record: record["headline"])
        names = ("map", "mauc", "d_prime", "accuracy")
        num_clips = len(self.feed.clips) * self.recipe.epochs
        summary = {
            "best_epoch": best["epoch"],
            **finite_or_null({name: best[name] for name in names}),
            "averaged": None if averaged is None else finite_or_null(averaged.scalars()),
            "running_ensemble": finite_or_null(progress.history[-1]["running_ensemble"]),
            "epochs": self.recipe.epochs,
            "world_size": self.world_size,
            "clips_per_s": num_clips / progress.train_s,
            "train_s": progress.train_s,
            "data_wait_share": progress.wait_s / progress.train_s,
        }
        write_summary(self.job.run, summary)

    def _save_model(self, name: str, state: dict[str, Tensor]) -> None:
        models.save(storage.join(self.job.run, name), state, self.config)

    def _write_per_class(self, metrics: TaggingMetrics) -> None:
        num_classes = len(self.labels)
        counts = [class_counts(clips, num_classes) for clips in (self.feed.clips, self.eval_clips)]
        text = per_class_csv(self.labels, metrics, *counts)
        storage.write_bytes(storage.join(self.job.run, "per_class.csv"), text.encode())

    def _checkpoint(self) -> None:
        """Every rank reports, rank 0 with the state."""
        epoch = self.progress.epochs_done
        with self._state_folder() as folder:
            checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
            metrics = {"epoch": epoch}
            if self.rank == 0:
                metrics |= {k: v for k, v in self.progress.history[-1].items() if k != "running_ensemble"}
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"epoch-{epoch:04d}")

    @contextmanager
    def _state_folder(self) -> Iterator[str | None]:
        if self.rank != 0:
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {
                "model": self.bare_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": {name: getattr(self.progress, name) for name in vars(self.progress)},
            }
            torch.save(state, os.path.join(folder, STATE_FILE))
            yield folder

    def _resume(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(os.path.join(folder, STATE_FILE), map_location="cpu", weights_only=True)
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        if self.rank == 0:
            logger.info(f"going on after epoch {self.progress.epochs_done}")
