"""Training of one stage from start to end. Read this module first: the rest of the package serves these lines."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from hive_scale.batch import Batch
from hive_scale.callbacks import Callback
from hive_scale.checkpoint.checkpointer import Checkpointer
from hive_scale.checkpoint.format import directory_name
from hive_scale.checkpoint.optimizer_transfer import OptimizerTransfer
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import Config
from hive_scale.distributed import World
from hive_scale.engine import Engine, StepOutput, memory, open_engine
from hive_scale.engine.compilation import renewing_cache
from hive_scale.engine.optimizer import optimizer_kind
from hive_scale.exit_codes import Stopped
from hive_scale.feature_cache import cached_features
from hive_scale.model import build
from hive_scale.model.adapters import AdaptedWeights
from hive_scale.observability.goodput import DataStall, Goodput
from hive_scale.observability.layer_stats import layer_grad_rms
from hive_scale.observability.metrics import read_metrics
from hive_scale.observability.profiler import profiling
from hive_scale.observability.rank_report import rank_report, read_reports
from hive_scale.observability.stage_log import StageLog
from hive_scale.observability.throughput import Throughput
from hive_scale.plan.devices import peak_flops
from hive_scale.plan.flops import estimate
from hive_scale.preflight import Data
from hive_scale.resilience.checkpoint_interval import CheckpointInterval
from hive_scale.resilience.loss_guard import BAD_BATCHES, LossGuard
from hive_scale.resilience.preemption import Preemption
from hive_scale.schedule import lr_factor
from hive_scale.seeding import seed_step
from hive_scale.version import code_version

logger = logging.getLogger(__name__)

PIECE = 1 << 24  # elements checked for finiteness at once: the check needs as much memory again


class TrainState:
    """Counters of a stage, and their save and resume. LR schedule and random numbers are functions of the step."""

    def __init__(
        self,
        checkpoints: Checkpointer,
        engine: Engine,
        guard: LossGuard,
        origin: Mapping[str, Sequence[str]],
        known: Mapping[str, Any],
    ) -> None:
        """`origin`: values that must match on resume (parent weights, data). `known`: provenance, informational.

        Each list in `origin` starts with the name that is written; names that older versions wrote follow it.
        """
        self.checkpoints, self.engine, self.guard, self.origin, self.known = checkpoints, engine, guard, origin, known
        self.step = 0  # optimizer steps taken
        self.passed = 0  # global batches skipped so far
        self.tokens = 0  # target tokens of the steps taken
        self.eval_loss: float | None = None  # held-out loss after the last step; None: that step did not evaluate

    @property
    def batch(self) -> int:
        """Index of the next global batch in the data stream: steps taken plus batches skipped."""
        return self.step + self.passed

    def take(self, num_tokens: int) -> None:
        """Count one optimizer step over `num_tokens` target tokens."""
        self.step, self.tokens = self.step + 1, self.tokens + num_tokens

    def save(self, global_batch: int, wait: bool) -> bool:
        """Write a checkpoint of this step. A collective.

        Returns False, and writes none, if a master weight, a moment or the held-out loss is not finite.
        """
        if not self._is_finite():
            if self.checkpoints.world.is_main:
                logger.warning(
                    "step %d is not saved: its weights, their moments or its held-out loss are not finite", self.step
                )
            return False
        state: dict[str, Any] = {"step": self.step, "samples": self.step * global_batch, "tokens": self.tokens}
        state |= {"passed": self.passed, "losses": self.guard.losses, "eval_loss": self.eval_loss}
        state |= {what: names[0] for what, names in self.origin.items()}
        self.checkpoints.save(self.step, self.engine.fragments(), {**state, **self.known}, wait=wait)
        return True

    def _is_finite(self) -> bool:
        """True if all ranks' master weights and moments are finite, and the held-out loss if there is one."""
        spoiled = not all(
            bool(piece.isfinite().all())
            for fragment in self.engine.fragments()
            for piece in torch.split(fragment.data, PIECE)
        )
        return not any(self.checkpoints.world.sum(spoiled)) and isfinite(self.eval_loss or 0.0)

    def resume(self) -> bool:
        """Load the newest checkpoint. Returns False if there is none.

        Raises ValueError if the checkpoint belongs to other data or other parent weights.
        """
        newest = self.checkpoints.latest()
        if newest is None:
            return False
        state = self.checkpoints.load(newest, self.engine.fragments())
        for what, names in self.origin.items():
            if state[what] not in names:
                raise ValueError(f"{newest} belongs to other {what}: restore what it began with, or use --overwrite")
        if state["code"] != code_version() and self.checkpoints.world.is_main:
            logger.warning("%s was saved by %s, and goes on with %s", newest, state["code"], code_version())
        self.step, self.passed, self.tokens = state["step"], state["passed"], state["tokens"]
        self.guard.restore(state["losses"])
        self.engine.after_load(self.step)
        return True

    def rollback(self) -> None:
        """Load the last checkpoint, and continue with the batches that come next, not with those already read.

        Raises ValueError if there is no checkpoint, or the run has rolled back too often.
        """
        self.guard.rollback()
        next_batch = self.batch
        if not self.resume():
            raise ValueError(
                "the loss or the weights are not finite, or far out, and no checkpoint is there to go back to: lower "
                f"the learning rates, raise warmup, or look at the samples in {BAD_BATCHES}"
            )
        self.passed = next_batch - self.step


class StageRun:
    """Runs one stage, from its newest checkpoint if it has one, to its end."""

    def __init__(
        self,
        config: Config,
        name: str,
        data: Data,
        world: World,
        parent: Path,
        preemption: Preemption,
        callbacks: Sequence[Callback] = (),
        explains: bool = True,
    ) -> None:
        """Open all that the stage needs. `explains`: what is shown comes with its legend, since no stage came before.

        Raises ValueError if the stage cannot be trained as the config says.
        """
        self.callbacks, self.explains = callbacks, explains
        self.config, self.name, self.data, self.world, self.preemption = config, name, data, world, preemption
        self.stage, self.dir = config.stages[name], config.run_dir / name
        self.metrics = self.dir / "metrics.jsonl"
        self.model, groups = build.for_stage(config.model, self.stage)
        self.moments = OptimizerTransfer(_stage_before(config, name) if self.stage.carry_optimizer_state else None)
        groups = self.moments.divide(groups)
        work = estimate(config.model, self.stage, config.engine.checkpointing) if world.is_main else None
        weights = read_weights(parent, world)
        features = cached_features(config, self.model, data.train, weights, world, preemption.requested)
        self.work = work.without("vision") if work and features else work
        self.train = data.train.with_features(features)
        adapted = self.model.adapted
        given = AdaptedWeights(adapted, weights, self.stage.seed) if adapted else weights
        self.engine = open_engine(self.model, groups, self.stage, config.engine, world, given)
        self.checkpoints = Checkpointer(self.dir, world, config.keep, config.max_failed_saves)
        # `origin` must match on resume; older versions wrote the data's fingerprint in other forms, all are accepted
        origin = {"parent": [weights.identity], "data": data.names}
        known = {"config": asdict(config), "code": code_version(), **self.moments.state(groups)}
        self.guard = LossGuard(config.guard)
        self.at = TrainState(self.checkpoints, self.engine, self.guard, origin, known)
        self.heldout: Iterable[Batch] | None = None  # None: nothing is held out
        if data.heldout:
            self.heldout = data.heldout.every(batch_size=self.stage.micro_batch, world=world)
        self.num_steps = self.stage.num_steps(data.train.num_samples)
        self.interval = CheckpointInterval(config.save_interval, config.expected_failures_per_day, config.grace_seconds)
        self.data_stall, self.waited = DataStall(data.train.config.workers), 0.0

    def run(self) -> Path:
        """Train to the end of the stage, and return the path of its last checkpoint.

        Raises Stopped on a stop request, after saving, and ValueError if rolling back has not helped.
        """
        if any(self.world.sum(self.preemption.requested())):
            raise Stopped(f"stopped before {self.name}")
        if not self.at.resume():
            self._warn_if_restarted()
            self.moments.fill(self.engine.fragments())
        self.goodput = Goodput(self.world.timer, read_metrics(self.metrics), self.at.step)
        for callback in self.callbacks:
            callback.on_stage(self)
        with renewing_cache():
            while not self._train():
                self.at.rollback()
                self.goodput.rollback(read_metrics(self.metrics), self.at.step)
        checkpoint = self.checkpoints.finish()
        assert checkpoint is not None
        return checkpoint

    def _warn_if_restarted(self) -> None:
        """Warn if the stage was trained before, but left neither weights nor a checkpoint, so starts over."""
        if self.world.is_main and (lines := read_metrics(self.metrics)):
            logger.warning(
                "%s begins again: its log reaches step %d, but neither its weights nor a checkpoint is there",
                self.dir, lines[-1]["step"],
            )  # fmt: skip

    def _train(self) -> bool:
        """The training loop. Returns True at the stage's end, False if the stage must roll back to a checkpoint.

        It must after too many bad batches in a row, or with weights that are not finite.
        """
        at, stage, timer, config = self.at, self.stage, self.world.timer, self.config
        batches = self.train.steps(
            global_batch=stage.global_batch,
            accumulation=stage.accumulation(self.world.size),
            seed=stage.seed,
            start=at.batch * stage.global_batch,
            world=self.world,
        )
        meter = Throughput(
            self.work.total if self.work else None,
            peak_flops(self.world.device, config.engine.precision),
            self.world.size,
            timer,
        )
        log = StageLog(self.dir, self.num_steps, at.step, at.tokens, config.log, self.world)
        with log, profiling(config.profile, self.dir / "profile", self.model.blocks(), self.world) as begin:
            self._show_memory(log)
            while at.step < self.num_steps:
                timer.step = at.step + 1
                begin(timer.step)
                timer.enter("data")
                began = perf_counter()
                micro_batches = next(batches)
                self.waited = perf_counter() - began
                timer.keys = tuple(key for batch in micro_batches for key in batch.keys)
                seed_step(stage.seed, at.step, self.world.rank)
                # the schedule counts optimizer steps, not batches read: a skipped batch uses up no warmup
                factor = lr_factor(at.step, self.num_steps, stage.warmup_ratio, stage.min_lr)
                output = self.engine.step(micro_batches, factor, self.guard.max_loss, self._flags)
                # the flags came with the all-reduce of the loss, so all ranks stop or save at the same step
                stop, save, *told = output.votes
                waits, held = read_reports(told, self.world)
                self.data_stall.stepped(waits, perf_counter() - began)
                if output.applied:
                    at.take(output.num_tokens)
                    self.guard.accept(output.loss)
                    self.goodput.held_up(max(waits) - self.waited)
                    rates = {name: group.lr * factor for name, group in stage.groups.items()}
                    metrics = output.metrics() | {"lr": rates, "data_seconds": round(max(waits), 6)}
                    metrics |= held | meter.step(micro_batches, output.num_tokens) | self._evaluate_if_due(log)
                    log.step(at.step, at.step * stage.global_batch, metrics | self.goodput.line())
                else:
                    self._skip_batch(output, log)
                    self.goodput.skip_batch(perf_counter() - began - self.waited)
                    if self.guard.reject():
                        return False
                for callback in self.callbacks:
                    callback.on_step(self, output)
                # the interval balances the cost of saving against the work lost in a failure (Daly 2006)
                self.interval.stepped(self.checkpoints.write_seconds)
                log.print(self.interval.warning())
                log.print(self.data_stall.warning())
                if (stop or save) and at.step < self.num_steps:  # the last step is saved below
                    saved = self._save(wait=bool(stop))
                    if stop:
                        how = "and saved it" if saved else "which is not fit to be saved"
                        raise Stopped(f"{self.name} stopped after step {at.step} of {self.num_steps}, {how}")
                    if not saved:
                        return False
            log.print(f"{self.name}: {self.goodput.close()}")
        return self._save(wait=False)

    def _show_memory(self, log: StageLog) -> None:
        table = memory.report(self.engine)
        log.keep("memory.txt", f"{table}\n{memory.LEGEND}")
        log.print(f"{table}\n{memory.LEGEND}" if self.explains else table)

    def _save(self, wait: bool) -> bool:
        """Save a checkpoint, perhaps in the background. Returns False, without saving, if the state is not finite."""
        self.world.timer.enter("save")
        began = perf_counter()
        saved = self.at.save(self.stage.global_batch, wait)
        if saved:
            self.interval.saved(perf_counter() - began)
            for callback in self.callbacks:
                callback.on_checkpoint(self, self.dir / directory_name(self.at.step))
        return saved

    def _flags(self) -> tuple[float, ...]:
        """This rank's (stop, save) requests, followed by its report for the log; summed over ranks with the loss."""
        stop, save = self.preemption.requested(), False
        if self.world.is_main:  # rank 0's clock decides for all ranks
            stop, save = stop or self.interval.time_is_up(), self.interval.due(self.at.step + 1)
        return stop, save, *rank_report(self.world, self.waited)

    def _evaluate_if_due(self, log: StageLog) -> dict[str, Any]:
        """Evaluate if this step is due: held-out loss per target token in nats, and per-layer gradient statistics.

        Without held-out data there is no loss.
        """
        at, interval = self.at, self.config.eval_interval
        at.eval_loss = None
        if at.step < self.num_steps and not (interval and at.step % interval == 0):
            return {}
        metrics: dict[str, Any] = {}
        if self.heldout is not None:
            began = perf_counter()
            loss_sum, num_tokens = self.engine.evaluate(log.evaluating(self.heldout))
            at.eval_loss = loss_sum / max(1, num_tokens)
            metrics = {"eval_loss": at.eval_loss, "eval_seconds": round(perf_counter() - began, 6)}
        behind, square_factor = self.moments.steps, partial(optimizer_kind(self.stage).square_factor, stage=self.stage)
        # read from the optimizer's state, so that it needs no extra backward
        metrics |= layer_grad_rms(self.model, self.engine.fragments(), at.step, square_factor, self.world, behind)
        for callback in self.callbacks:
            callback.on_evaluate(self, metrics)
        return metrics

    def _skip_batch(self, output: StepOutput, log: StageLog) -> None:
        """Count the batch as skipped, and log its samples, loss and gradient norm."""
        number, size = self.at.batch, self.stage.global_batch
        self.at.passed += 1
        if self.world.is_main:
            keys = self.data.train.keys(self.stage.seed, number * size, size)
            path = self.config.run_dir / BAD_BATCHES
            log.print(self.guard.note(path, self.name, self.at.step + 1, output.loss, output.grad_norm, keys))


def _stage_before(config: Config, name: str) -> Path:
    names = list(config.stages)
    return config.run_dir / names[names.index(name) - 1]
