"""Run the stages of a config in order, each starting from the weights of the previous one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from hive_scale import checksums, header
from hive_scale.callbacks import Callback
from hive_scale.checkpoint.io import published
from hive_scale.checkpoint.run_claims import (
    Overwrite,
    begin_stage,
    check_owner,
    claim_run_dir,
    is_again,
    is_begun,
    on_main,
)
from hive_scale.checkpoint.run_reader import Run, encoder_remedy
from hive_scale.checkpoint.stage_files import ENCODER, WEIGHTS, find_weights, is_stage_done
from hive_scale.checkpoint.weights import Weights, merge_trained_weights, read_weights, write_weights
from hive_scale.config import Config, ModelConfig, run_of
from hive_scale.config_merge import holds_weights_alone
from hive_scale.distributed import World
from hive_scale.engine import memory
from hive_scale.exit_codes import Stopped
from hive_scale.export import merge_of
from hive_scale.export.huggingface import export_encoder
from hive_scale.locate import check_sources
from hive_scale.model import build
from hive_scale.model.hive import Hive
from hive_scale.observability.console import console
from hive_scale.phase_timer import FETCH
from hive_scale.plan.choose import choose_all
from hive_scale.preflight import check, check_data_fingerprint, check_shards_stay, open_all
from hive_scale.resilience.preemption import Preemption, listening
from hive_scale.resilience.run_lock import locked
from hive_scale.resilience.watchdog import Watchdog
from hive_scale.rundir import check_place
from hive_scale.train import StageRun

PREFIXES = {"vision": ("vision.",), "language": ("language.",), "connector": ("projector.", "fusion.")}


def initial_model(config: ModelConfig, seed: int) -> Hive:
    """Build the model with its initial weights, float32 on the CPU.

    Raises ValueError that names a component's tensors that are missing, have another shape or are not finite.
    """
    paths = {"vision": config.vision.path, "language": config.language.path, "connector": config.connector_weights}
    ours = {part: path for part, path in paths.items() if path and (part == "connector" or _is_ours(path))}
    model = build.init_model(config, seed, {part: _tensors(part, path) for part, path in ours.items()})
    if spoiled := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        more = f" and {len(spoiled) - 1} more" if len(spoiled) > 1 else ""
        raise ValueError(f"{spoiled[0]}{more} would begin with values that are not finite: give the part other weights")
    return model


def _is_ours(path: str) -> bool:
    return holds_weights_alone(path) or run_of(path) is not None


def _tensors(part: str, path: str) -> Mapping[str, Tensor]:
    """The component's tensors under its own names: its part of a whole HIVE, else all tensors of the file."""
    weights, prefixes = _open(part, path), PREFIXES[part]
    chosen = [name for name in weights if name.startswith(prefixes)]
    if part == "connector":
        return {name: weights[name] for name in chosen}
    (prefix,) = prefixes
    return {name.removeprefix(prefix): weights[name] for name in chosen or weights}


def _open(part: str, path: str) -> Weights:
    place = Path(path).expanduser()
    try:
        if (place / "config.yaml").is_file():
            run = Run(place)
            place = run.weights(run.stage())
        return read_weights(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.{part}: {path} cannot be begun with: {error}") from None


def run_pipeline(
    config: Config,
    world: World,
    overwrite: Overwrite = False,
    until: str | None = None,
    patience: float = 0.0,
    follows: bool = False,
    callbacks: Sequence[Callback] = (),
) -> bool:
    """Train every unfinished stage, each from the weights of the previous one; a finished run returns at once.

    Returns True if there was anything to train.

    With `overwrite` an existing run is moved aside, or deleted, and started over. `until` is the last stage to train
    (None: all). A run that `follows` another, such as its blank-image control, accepts changes of that run's config.
    `callbacks` are called while it trains, see `hive_scale.callbacks`.
    Raises ValueError for what the user must change, before training starts and without leaving files behind; also
    if the last stage's weights or encoder are corrupt. Raises TryAgain if another process works on the same run
    directory for longer than `patience` seconds, and Stopped on a signal or a file STOP.
    """
    world.timer.enter("start")
    on_main(world, lambda: check_place(config))
    with (
        Watchdog(world, config.watchdog_seconds),
        locked(config.run_dir, world, patience) as lock,
        listening(config.run_dir, world) as preemption,
    ):
        if overwrite and world.of_main(is_again(config.run_dir)):
            overwrite = False
        on_main(world, lambda: check_owner(config, overwrite, follows))
        names = list(config.stages)
        wanted = names[: names.index(until) + 1] if until else names
        if not overwrite and world.is_main:
            for name in wanted:
                _mend_encoder(config, name)
        world.barrier()
        if left := _left(config, wanted, world, bool(overwrite)):
            if not follows:
                header.show_run(config, left, world, overwrite)
            if any(world.sum(preemption.requested())):
                raise Stopped("stopped before it began")
            take = partial(claim_run_dir, config, world, lock, overwrite, follows)
            _run_stages(config, wanted, left, world, preemption, bool(overwrite), take, callbacks, not follows)
        elif world.is_main:
            _check_result(config, wanted[-1])
    return bool(left)


def _left(config: Config, wanted: Sequence[str], world: World, anew: bool) -> list[str]:
    """The stages still to be trained. A collective: the main rank alone looks.

    Another node may yet believe that a file is not there, and ranks that went different ways would wait for each other.
    """
    return world.of_main(
        [name for name in wanted if world.is_main and (anew or not is_stage_done(config.run_dir / name))]
    )


def _run_stages(
    config: Config,
    wanted: Sequence[str],
    left: Sequence[str],
    world: World,
    preemption: Preemption,
    anew: bool,
    take: Callable[[], None],
    callbacks: Sequence[Callback],
    with_header: bool,
) -> None:
    weights = config.run_dir / "initial" / WEIGHTS
    first = None
    # until a stage has begun, the user may still edit the initial weights in the config, so they are made again
    begun = any(is_begun(config.run_dir / name) for name in config.stages)
    begins = anew or not begun or not find_weights(weights)
    check_sources(config, begins and world.is_main)  # other ranks take the first weights from the run
    found = open_all(config, noted=False)
    if anew:
        check_shards_stay(config, found)
    check(config, found, dict.fromkeys(left, world.size))
    if with_header:
        header.show_data(config, found, left, world)
    del found
    if world.is_main and begins:
        world.timer.enter(FETCH if _comes_from_a_hub(config.model) else "start")
        first = initial_model(config.model, seed=next(iter(config.stages.values())).seed)
        world.timer.enter("start")
    # claim the directory only now: a command refused earlier must leave no claim that conflicts with its correction
    take()
    data = open_all(config)
    check_data_fingerprint(config, data, world)
    if world.is_main:
        (config.run_dir / "outcome.txt").unlink(missing_ok=True)  # stale: it covers fewer stages
    if first is not None:
        write_weights(weights, dict(first.named_parameters()))
        del first
    chosen = choose_all(config, left, world)
    if with_header:
        header.show_plan(config, data, left, world, chosen)
    world.barrier()
    for name in wanted:
        stage_dir = config.run_dir / name
        if name in left:
            world.timer.enter("start")
            begin_stage(config, name, world)
            settled = replace(config, engine=chosen[name].engine)
            checkpoint = StageRun(
                settled, name, data[name], world, weights, preemption, callbacks, explains=name == left[0]
            ).run()
            world.timer.enter("handoff")
            memory.release()
            if world.is_main:
                merge_trained_weights(weights, checkpoint, stage_dir / WEIGHTS, merge_of(config, name))
                _give_encoder(config, name)
            world.barrier()
        weights = stage_dir / WEIGHTS


def _give_encoder(config: Config, name: str) -> None:
    stage_dir = config.run_dir / name
    with published(stage_dir / ENCODER) as folder:
        export_encoder(config.model, read_weights(stage_dir / WEIGHTS), folder, config.data_of(name).image_transform)


def _mend_encoder(config: Config, name: str) -> None:
    """Export the encoder of a finished stage again if it is missing: the stage's weights are enough for that."""
    stage_dir = config.run_dir / name
    if find_weights(stage_dir / WEIGHTS) and not (stage_dir / ENCODER).is_dir():
        _give_encoder(config, name)
        console.print(f"{stage_dir / ENCODER} was not there: made again from the stage's weights", soft_wrap=True)


def _check_result(config: Config, name: str) -> None:
    """Verify weights and encoder of a finished run's last stage. Raises CorruptFile, with the remedy."""
    stage_dir = config.run_dir / name
    read_weights(stage_dir / WEIGHTS)
    checksums.check(stage_dir / ENCODER, remedy=encoder_remedy(stage_dir / ENCODER))


def _comes_from_a_hub(model: ModelConfig) -> bool:
    paths = [path for path in (model.vision.path, model.language.path) if path]
    return not all(Path(path).expanduser().exists() for path in paths)
