"""A run from start to end. Read this first: everything else serves one of these lines."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from hive_scale import config as configs
from hive_scale.checkpoint.files import published
from hive_scale.checkpoint.handoff import build_handoff, read_weights, write_weights
from hive_scale.checkpoint.lock import LOCK, locked
from hive_scale.checkpoint.marker import WEIGHTS, find_weights, is_done
from hive_scale.checkpoint.moments import Moments
from hive_scale.checkpoint.provenance import code_version
from hive_scale.checkpoint.store import Store
from hive_scale.config import Config, StageConfig
from hive_scale.data.loader import Loader
from hive_scale.data.transform import Tokenizer, open_tokenizer
from hive_scale.distributed import World
from hive_scale.engine import Engine, memory, open_engine
from hive_scale.initial import assemble
from hive_scale.model import build
from hive_scale.model.export import export_encoder
from hive_scale.plan.devices import peak_flops
from hive_scale.plan.flops import count
from hive_scale.randomness import seed_step
from hive_scale.schedule import lr_factor
from hive_scale.stage import freeze
from hive_scale.watch.gauge import gauge
from hive_scale.watch.interrupt import Interrupt, listening
from hive_scale.watch.log import StageLog
from hive_scale.watch.profiler import profiling
from hive_scale.watch.throughput import Throughput

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""


@dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    train: Loader
    heldout: Loader


def run_pipeline(
    config: Config, world: World, overwrite: bool = False, until: str | None = None, patience: float = 0.0
) -> None:
    """Train every unfinished stage, each from the weights of the one before; a finished run returns at once.

    `until` is the last stage to train (None: all). Raises ValueError for what the user must change, before
    training starts, RuntimeError if another run is at work in the same directory and does not leave it within
    `patience` seconds, and Stopped when a signal or a file STOP has asked for it.
    """
    with locked(config.run_dir, world, patience), listening(config.run_dir, world) as interrupt:
        _claim(config, world, overwrite)
        names = list(config.stages)
        wanted = names[: names.index(until) + 1] if until else names
        if not all(is_done(config.run_dir / name) for name in wanted):
            _run_stages(config, wanted, world, interrupt)


def _run_stages(config: Config, wanted: Sequence[str], world: World, interrupt: Interrupt) -> None:
    data = open_all(config)
    check(config, data, world.size)
    weights = config.run_dir / "initial" / WEIGHTS
    if world.is_main and not find_weights(weights):
        model = assemble(config.model, seed=next(iter(config.stages.values())).seed)
        write_weights(weights, dict(model.named_parameters()))
    world.barrier()
    for name in wanted:
        stage, stage_dir = config.stages[name], config.run_dir / name
        if not is_done(stage_dir):
            checkpoint = _run_stage(config, name, stage, data[name], world, weights, interrupt)
            if world.is_main:
                build_handoff(weights, checkpoint, stage_dir / WEIGHTS)
                with published(stage_dir / "encoder") as folder:
                    export_encoder(config.model, read_weights(stage_dir / WEIGHTS), folder, config.data.image)
            world.barrier()
        weights = stage_dir / WEIGHTS


def _run_stage(
    config: Config, name: str, stage: StageConfig, data: Data, world: World, parent: Path, interrupt: Interrupt
) -> Path:
    """Train one stage to its end, from its newest checkpoint if it has one; returns its last checkpoint."""
    if any(world.sum(interrupt.requested())):
        raise Stopped(f"stopped before {name}")
    stage_dir = config.run_dir / name
    model = build.skeleton(config.model)
    moments = Moments(_stage_before(config, name) if stage.keep_moments else None)
    groups = moments.divide(freeze(model, stage, model.dormant()))
    work = count(model, config.engine.checkpointing)
    engine = open_engine(model, groups, stage, config.engine, world, read_weights(parent))
    store = Store(stage_dir, world, config.keep, config.max_failed_saves)
    origin = {"parent": read_weights(parent).identity, "data": data.train.fingerprint}
    # what a checkpoint says beside masters and moments; random numbers and schedule are functions of the step
    known = {**origin, "config": asdict(config), "code": code_version(), **moments.state(groups)}
    (step, tokens), num_steps = _resume(store, engine, origin), stage.num_steps(data.train.num_samples)
    if step == 0:
        moments.fill(engine.fragments())
    batches = data.train.steps(
        global_batch=stage.global_batch,
        accumulation=stage.accumulation(world.size),
        seed=stage.seed,
        start=step * stage.global_batch,
        world=world,
    )
    meter = Throughput(work.total, peak_flops(world.device, config.engine.precision), world.size)
    profiled = profiling(config.profile, stage_dir / "profile", model.blocks(), world)
    with StageLog(stage_dir, num_steps, step, tokens, config.log, world) as log, profiled as begin:
        log.say(memory.report(engine), keep="memory.txt")
        while step < num_steps:
            begin(step + 1)
            factor = lr_factor(step, num_steps, stage.warmup, stage.min_lr)
            began = perf_counter()
            micro_batches = next(batches)
            waited = perf_counter() - began
            seed_step(stage.seed, step, world.rank)
            # a request to any rank stops them all, at the same step
            output = engine.step(micro_batches, factor, votes=lambda: [interrupt.requested()])
            (stop,) = output.votes
            step += 1
            rates = {name: group.lr * factor for name, group in stage.groups.items()}
            metrics = {
                "loss": output.loss,
                "grad_norm": output.grad_norm,
                "num_tokens": output.num_tokens,
                "lr": rates,
                "data_seconds": waited,
                **meter.step(micro_batches, output.num_tokens),
            }
            if step == num_steps or (config.eval_interval and step % config.eval_interval == 0):
                metrics["eval_loss"] = _heldout_loss(engine, stage, data, world)
                metrics |= gauge(model, engine.fragments(), step, stage.betas[1], world)
            log.step(step, step * stage.global_batch, metrics)
            if stop or step == num_steps or step % config.save_interval == 0:
                state = {"step": step, "samples": step * stage.global_batch, "tokens": log.tokens, **known}
                state["eval_loss"] = metrics.get("eval_loss")
                store.save(step, engine.fragments(), state, wait=bool(stop))
            if stop and step < num_steps:
                raise Stopped(f"{name} stopped after step {step} of {num_steps}, and saved it")
    checkpoint = store.finish()
    assert checkpoint is not None
    return checkpoint


def _stage_before(config: Config, name: str) -> Path:
    names = list(config.stages)
    if name == names[0]:
        raise ValueError(f"stages.{name}.keep_moments: no stage comes before this one: set it to false")
    return config.run_dir / names[names.index(name) - 1]


def _resume(store: Store, engine: Engine, origin: Mapping[str, str]) -> tuple[int, int]:
    """Optimizer steps done already, and their target tokens.

    Raises ValueError if they were done on other data or from other weights.
    """
    newest = store.latest()
    if newest is None:
        return 0, 0
    state = store.load(newest, engine.fragments())
    for what, identity in origin.items():
        if state[what] != identity:
            raise ValueError(f"{newest} belongs to other {what}: restore what it began with, or use --overwrite")
    if state["code"] != code_version() and store.world.is_main:
        logger.warning("%s was saved by %s, and goes on with %s", newest, state["code"], code_version())
    engine.refresh(state["step"])
    return int(state["step"]), int(state["tokens"])


def _heldout_loss(engine: Engine, stage: StageConfig, data: Data, world: World) -> float:
    """Mean loss per target token over all held-out pairs, in nats."""
    parts = [engine.evaluate([batch]) for batch in data.heldout.once(batch_size=stage.micro_batch, world=world)]
    return sum(loss for loss, _ in parts) / max(1, sum(count for _, count in parts))


def open_data(config: Config, stage: str = "") -> Data:
    """The data of `stage`; without, the run's."""
    data = (config.stages[stage].data if stage else None) or config.data
    tokenizer = open_tokenizer(data.tokenizer)
    size, bad = build.image_size(config.model), config.run_dir / "bad_samples.jsonl"
    return Data(
        tokenizer,
        Loader(data, data.train, tokenizer, image_size=size, bad_samples=bad),
        Loader(data, data.heldout, tokenizer, image_size=size, bad_samples=bad),
    )


def open_all(config: Config) -> dict[str, Data]:
    """The data of every stage, by its name; stages that read the run's share it."""
    opened: dict[str, Data] = {}
    of_run = [name for name, stage in config.stages.items() if stage.data is None]
    opened |= dict.fromkeys(of_run, open_data(config)) if of_run else {}
    return opened | {name: open_data(config, name) for name in config.stages if name not in opened}


def check(config: Config, data: Mapping[str, Data], world_size: int) -> None:
    """Meet every error of any stage now, not in the night. Raises ValueError."""
    model = build.skeleton(config.model)
    for name, stage in config.stages.items():
        try:
            freeze(model, stage, model.dormant())
            stage.accumulation(world_size)
            stage.num_steps(data[name].train.num_samples)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None
        known, size = build.vocabulary_size(config.model), data[name].tokenizer.vocab_size
        if size > known:
            raise ValueError(
                f"the tokenizer has {size} tokens, the LLM {known}: set data.tokenizer.path to the LLM's own directory"
            )


def _claim(config: Config, world: World, overwrite: bool) -> None:
    """Write the config into the run directory, or see that the one there is of the same run."""
    saved = config.run_dir / "config.yaml"
    if world.is_main and overwrite and saved.exists():
        for entry in config.run_dir.iterdir():
            if entry.name != LOCK:  # which is ours
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    world.barrier()
    if saved.exists():
        if changed := configs.differences(config, configs.load(saved)):
            raise ValueError(
                f"{config.run_dir} holds another run (other {', '.join(changed)}): give output=DIR, or --overwrite"
            )
    elif world.is_main:
        configs.save(config, saved)
