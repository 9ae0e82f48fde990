"""A run: its stages one after the other, each from the weights of the one before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hive_scale.checkpoint.files import published
from hive_scale.checkpoint.handoff import build_handoff, read_weights, write_weights
from hive_scale.checkpoint.lock import locked
from hive_scale.checkpoint.marker import WEIGHTS, find_weights, is_done
from hive_scale.config import Config, ModelConfig
from hive_scale.distributed import World
from hive_scale.engine import memory
from hive_scale.initial import assemble
from hive_scale.model.export import export_encoder
from hive_scale.preparation import check, check_owner, claim, open_all, same_data
from hive_scale.pulse import FETCH
from hive_scale.stops import Stopped
from hive_scale.train import StageRun
from hive_scale.watch.hang import HangWatch
from hive_scale.watch.interrupt import Interrupt, listening


def run_pipeline(
    config: Config, world: World, overwrite: bool = False, until: str | None = None, patience: float = 0.0
) -> None:
    """Train every unfinished stage, each from the weights of the one before; a finished run returns at once.

    `until` is the last stage to train (None: all). Raises ValueError for what the user must change, before
    training starts, TryAgain if another run is at work in the same directory and does not leave it within
    `patience` seconds, and Stopped when a signal or a file STOP has asked for it.
    """
    world.pulse.enter("start")
    with (
        HangWatch(world, config.hang_seconds),
        locked(config.run_dir, world, patience),
        listening(config.run_dir, world) as interrupt,
    ):
        if not overwrite:
            check_owner(config)
        names = list(config.stages)
        wanted = names[: names.index(until) + 1] if until else names
        if overwrite or not all(is_done(config.run_dir / name) for name in wanted):
            if any(world.sum(interrupt.requested())):
                raise Stopped("stopped before it began")
            _run_stages(config, wanted, world, interrupt, overwrite)


def _run_stages(config: Config, wanted: Sequence[str], world: World, interrupt: Interrupt, overwrite: bool) -> None:
    left = [name for name in wanted if overwrite or not is_done(config.run_dir / name)]
    check(config, open_all(config, noted=False), dict.fromkeys(left, world.size))
    weights = config.run_dir / "initial" / WEIGHTS
    first = None
    if world.is_main and (overwrite or not find_weights(weights)):
        world.pulse.enter(FETCH if _comes_from_a_hub(config.model) else "start")
        first = assemble(config.model, seed=next(iter(config.stages.values())).seed)
        world.pulse.enter("start")
    # not before: to a directory that a refused command had claimed, the corrected one would be another run
    claim(config, world, overwrite)
    data = open_all(config)
    same_data(config, data, world)
    if first is not None:
        write_weights(weights, dict(first.named_parameters()))
        del first
    world.barrier()
    for name in wanted:
        stage_dir = config.run_dir / name
        if not is_done(stage_dir):
            world.pulse.enter("start")
            checkpoint = StageRun(config, name, data[name], world, weights, interrupt).run()
            world.pulse.enter("handoff")
            memory.release()
            if world.is_main:
                build_handoff(weights, checkpoint, stage_dir / WEIGHTS)
                with published(stage_dir / "encoder") as folder:
                    image = config.data_of(name).image
                    export_encoder(config.model, read_weights(stage_dir / WEIGHTS), folder, image)
            world.barrier()
        weights = stage_dir / WEIGHTS


def _comes_from_a_hub(model: ModelConfig) -> bool:
    paths = [path for path in (model.vision.path, model.language.path) if path]
    return not all(Path(path).expanduser().exists() for path in paths)
