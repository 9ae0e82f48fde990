"""What a run needs, and is checked for, before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hive_scale import config as configs
from hive_scale import strict_json
from hive_scale.checkpoint.lock import LOCK
from hive_scale.checkpoint.marker import is_done
from hive_scale.config import Config
from hive_scale.data.loader import Loader
from hive_scale.data.tokenizer import Tokenizer, open_tokenizer
from hive_scale.distributed import World
from hive_scale.engine import check_compiler
from hive_scale.features import check_disk
from hive_scale.model import build
from hive_scale.stage import freeze
from hive_scale.strict_json import dumps


@dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    train: Loader
    heldout: Loader


def open_data(config: Config, stage: str = "", noted: bool = True) -> Data:
    """The data of `stage`; without, the run's. What cannot be used of it is `noted` in the run directory."""
    data = config.data_of(stage)
    tokenizer = open_tokenizer(data.tokenizer)
    bad = config.run_dir / "bad_samples.jsonl" if noted else None

    def loader(shards: list[str]) -> Loader:
        size, colour = build.image_size(config.model), build.pad_colour(config.model)
        return Loader(data, shards, tokenizer, image_size=size, pad_colour=colour, bad_samples=bad)

    return Data(tokenizer, loader(data.train), loader(data.heldout))


def open_all(config: Config, noted: bool = True) -> dict[str, Data]:
    """The data of every stage, by its name; stages that read the run's share it."""
    opened: dict[str, Data] = {}
    of_run = [name for name, stage in config.stages.items() if not stage.data]
    opened |= dict.fromkeys(of_run, open_data(config, noted=noted)) if of_run else {}
    return opened | {name: open_data(config, name, noted) for name in config.stages if name not in opened}


def check(config: Config, data: Mapping[str, Data], worlds: Mapping[str, int], here: bool = True) -> None:
    """Meet every error of any stage now, not in the night. Raises ValueError.

    `worlds` are the numbers of processes of the stages to be trained, and `here` tells whether by this machine.
    """
    _check_engines(config, worlds, here)
    if here:
        check_compiler(config.engine)
    model = build.skeleton(config.model)
    for name, stage in config.stages.items():
        try:
            freeze(model, stage, model.dormant())
            if name in worlds:
                stage.accumulation(worlds[name])
            stage.num_steps(data[name].train.num_samples)
            check_disk(config, model, data[name].train)
            _try_some(data[name].train)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None
        known, size = build.vocabulary_size(config.model), data[name].tokenizer.vocab_size
        if size > known:
            raise ValueError(
                f"the tokenizer has {size} tokens, the LLM {known}: set data.tokenizer.path to the LLM's own directory"
            )


def _check_engines(config: Config, worlds: Mapping[str, int], here: bool) -> None:
    first, engine = next(iter(config.stages), ""), config.engine
    if first and config.stages[first].keep_moments:
        raise ValueError(f"stages.{first}.keep_moments: no stage comes before this one: set it to false")
    if engine.ds_config:
        from hive_scale.engine import ds_json  # which takes seconds to import DeepSpeed

        stages = {name: (config.stages[name], world_size) for name, world_size in worlds.items()}
        ds_json.check(Path(engine.ds_config), stages, engine, here)
        return
    for name, size in worlds.items():
        if engine.shard and size % engine.shard:
            raise ValueError(
                f"stages.{name}: engine.shard={engine.shard} does not divide the {size} processes: use a divisor of it"
            )


def _try_some(loader: Loader, count: int = 4) -> None:
    """Raises ValueError if of a few samples from all over the set none can be used, for then none will be."""
    size, reason = len(loader.index), ""
    for i in range(0, size, max(1, size // count)):
        try:
            loader.sample(i)
            return
        except ValueError as error:
            reason = reason or f"{loader.index.key(i)} of {loader.index.shard(i)}: {error}"
    raise ValueError(f"no sample that was tried can be used; the first is {reason}")


def same_data(config: Config, data: Mapping[str, Data], world: World) -> None:
    """Note what samples the run begins with; from then on see that they are there. A collective.

    Checkpoints know their samples, but a stage that has none yet would begin with whatever a pattern still matches.
    Raises ValueError.
    """
    path = config.run_dir / "data.json"
    sets = {name: one.train for name, one in data.items()}
    now = {name: {"samples": len(one.index), "fingerprint": one.fingerprint} for name, one in sets.items()}
    if world.is_main and not path.exists():
        unnamed = path.with_suffix(".tmp")
        unnamed.write_text(dumps(now, indent=1))
        unnamed.rename(path)
    world.barrier()
    before = strict_json.read(path)
    for name in config.stages:
        if before[name] != now[name] and not is_done(config.run_dir / name):
            raise ValueError(
                f"stages.{name}: the run began with {before[name]['samples']:,} training samples, and finds "
                f"{now[name]['samples']:,}, not all of them the same: restore its shards, or use --overwrite"
            )


def check_owner(config: Config) -> None:
    """Raises ValueError if the run directory is another run's."""
    saved = config.run_dir / "config.yaml"
    if saved.exists() and (changed := configs.differences(config, configs.load(saved))):
        raise ValueError(
            f"{config.run_dir} holds another run (other {', '.join(changed)}): give output=DIR, or --overwrite"
        )


def claim(config: Config, world: World, overwrite: bool) -> None:
    """Make the run directory this run's, which it stays; with `overwrite` empty it first."""
    saved = config.run_dir / "config.yaml"
    if world.is_main and overwrite and saved.exists():
        for entry in config.run_dir.iterdir():
            if entry.name != LOCK:  # which is ours
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    world.barrier()
    if world.is_main and not saved.exists():
        configs.save(config, saved)
