"""Open the data of a run, and check everything that could fail later, before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from hive_scale import checksums, credentials, strict_json
from hive_scale import config as configs
from hive_scale.atomic import write_text
from hive_scale.checkpoint.run_claims import is_begun
from hive_scale.checkpoint.stage_files import is_stage_done
from hive_scale.config import Config, DataConfig
from hive_scale.data.loader import Loader
from hive_scale.data.tokenizer import Tokenizer, open_tokenizer
from hive_scale.device import kind
from hive_scale.distributed import World
from hive_scale.engine import check_device
from hive_scale.engine.compilation import check_compiler
from hive_scale.engine.optimizer import check_optimizer
from hive_scale.feature_cache import check_disk
from hive_scale.model import build
from hive_scale.strangers import some
from hive_scale.strict_json import dumps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The data of a stage: training and held-out samples, and their tokenizer."""

    tokenizer: Tokenizer
    train: Loader
    heldout: Loader | None  # None: nothing is held out

    @property
    def names(self) -> list[str]:
        """Names of these data in checkpoints: the present fingerprint first, then the one of older versions."""
        heldout = self.heldout.fingerprint if self.heldout else "none"
        return [f"{self.train.fingerprint}-{heldout}", self.train.layout]

    def parts(self) -> dict[str, Loader]:
        """The sets by the key of the config that names them."""
        return {"train": self.train} | ({"heldout": self.heldout} if self.heldout else {})


def open_data(config: Config, stage: str = "", noted: bool = True) -> Data:
    """Open the data of `stage`, by default the run's. With `noted`, bad samples are logged in the run directory.

    Raises ValueError if shards or tokenizer cannot be used.
    """
    data = config.data_of(stage)
    tokenizer = open_tokenizer(data.tokenizer)
    bad = config.run_dir / "bad_samples.jsonl" if noted else None

    def loader(shards: list[str], key: str) -> Loader:
        size, colour = build.image_size(config.model), build.pad_colour(config.model)
        try:
            return Loader(data, shards, tokenizer, image_size=size, pad_colour=colour, bad_samples=bad, split=key)
        except ValueError as error:
            raise ValueError(f"data.{key}: {error}{_other_heldout(data) if key == 'heldout' else ''}") from None

    train = loader(data.train, "train")
    if not data.heldout:
        return Data(tokenizer, train, None)
    if data.heldout_share:
        try:
            train, heldout = train.split(data.heldout_share)
        except ValueError as error:
            raise ValueError(f"data.heldout={data.heldout[0]}: {error}") from None
    else:
        heldout = loader(data.heldout, "heldout")
    return Data(tokenizer, train, heldout.at_most(data.heldout_samples))


def _other_heldout(data: DataConfig) -> str:
    """What `data.heldout` could be instead, as the end of a message."""
    beside = _heldout_beside(data)
    there = f"; there is data.heldout='[{','.join(beside)}]'" if beside and beside != data.heldout else ""
    return f"{there}; data.heldout=5% holds out a share of data.train, data.heldout=none nothing"


def _heldout_beside(data: DataConfig) -> list[str]:
    """The held-out sets that lie beside those of `data.train`, as `prepare_data.py` writes them."""
    found = []
    for pattern in data.train:
        is_folder = Path(pattern).is_dir()
        beside = pattern if is_folder else pattern.replace("train-", "heldout-")
        tars = f"{beside}/heldout-*.tar" if is_folder else beside
        found += [beside] if tars != pattern and any(glob(tars)) else []
    return found


def open_all(config: Config, noted: bool = True) -> dict[str, Data]:
    """Open the data of every stage, by stage name; stages without overrides share one `Data`."""
    opened: dict[str, Data] = {}
    of_run = [name for name, stage in config.stages.items() if not stage.data]
    opened |= dict.fromkeys(of_run, open_data(config, noted=noted)) if of_run else {}
    return opened | {name: open_data(config, name, noted) for name in config.stages if name not in opened}


def check(config: Config, data: Mapping[str, Data], worlds: Mapping[str, int], here: bool = True) -> None:
    """Check every stage for errors that would otherwise come hours later. Raises ValueError.

    `worlds` maps the stages to be trained to their number of processes; `here` is True if this machine trains them.
    """
    _check_engines(config, worlds, here)
    _check_optimizers(config)
    if here:
        check_compiler(config.engine, kind())
        check_device(config.engine, kind())
    for name, stage in config.stages.items():
        if name == next(other for other, opened in data.items() if opened is data[name]):  # one warning for one set
            _check_heldout(config, name, data[name])
        try:
            model, groups = build.for_stage(config.model, stage)
            if name in worlds:
                check_optimizer(stage, groups, model, config.engine, worlds[name])
            build.check_positions(model, config.data_of(name).max_tokens)
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
    if first and config.stages[first].carry_optimizer_state:
        raise ValueError(f"stages.{first}.carry_optimizer_state: no stage comes before this one: set it to false")
    if engine.ds_config:
        from hive_scale.engine import deepspeed_config  # imported here because DeepSpeed takes seconds to import

        stages = {name: (config.stages[name], world_size) for name, world_size in worlds.items()}
        deepspeed_config.check(Path(engine.ds_config), stages, engine, here)
        return
    for name, size in worlds.items():
        if engine.shard_size and size % engine.shard_size:
            raise ValueError(
                f"stages.{name}: engine.shard_size={engine.shard_size} does not divide the {size} processes: use a "
                "divisor of it"
            )


def _check_optimizers(config: Config) -> None:
    before = ""
    for name, stage in config.stages.items():
        if stage.carry_optimizer_state and stage.optimizer != before:
            raise ValueError(
                f"stages.{name}.carry_optimizer_state: {stage.optimizer} cannot take over what {before} has: set it to "
                "false, or give both stages one optimizer"
            )
        before = stage.optimizer


def _check_heldout(config: Config, stage: str, opened: Data) -> None:
    """Warn if the held-out set of `stage` is the shipped one and the training set is not, or if it is trained on.

    Raises ValueError if nothing is held out, and the run needs a held-out loss.
    """
    data = config.data_of(stage)
    if data.heldout == ["sample:heldout"] and data.train != ["sample:train"]:
        logger.warning(
            "held-out losses are of the shipped emoji, not of data like data.train: set data.heldout%s",
            _other_heldout(data),
        )
    if opened.heldout and not data.heldout_share:
        trained = {stamp.digest for stamp in opened.train.index.stamps}
        both = [
            shard
            for shard, stamp in zip(opened.heldout.index.shards, opened.heldout.index.stamps, strict=True)
            if stamp.digest in trained
        ]
        if both:
            logger.warning(
                "data.heldout: %s is trained on, too, so that the held-out loss says little about new data%s",
                some(both, 1),
                _other_heldout(data),
            )
    if not data.heldout and config.keep.best:
        raise ValueError(
            f"stages.{stage}: keep.best=true needs a held-out loss, and data.heldout=none: set data.heldout, such as "
            "data.heldout=5%, or keep.best=false"
        )


def _try_some(loader: Loader, count: int = 4) -> None:
    """Raises ValueError if none of about `count` samples, spread over the set, can be read."""
    reason = ""
    for i in map(int, loader.numbers[:: max(1, len(loader.numbers) // count)]):
        try:
            loader.sample(i)
            return
        except ValueError as error:
            reason = reason or f"{loader.index.key(i)} of {loader.index.shard(i)}: {error}"
    raise ValueError(f"no sample that was tried can be used; the first is {reason}")


def check_shards_stay(config: Config, data: Mapping[str, Data]) -> None:
    """Raises ValueError if a shard lies in the run directory, which will be moved away, whatever the pattern is."""
    real = config.run_dir.resolve()
    for part, loader in (item for one in data.values() for item in one.parts().items()):
        for place in map(credentials.place, loader.index.shards):
            if "://" not in place and Path(place).resolve().is_relative_to(real):
                raise ValueError(
                    f"data.{part}: {credentials.hide(place)} lies in {config.run_dir}, which --overwrite would move "
                    "away: choose another output"
                )


def check_data_fingerprint(config: Config, data: Mapping[str, Data], world: World) -> None:
    """Record the fingerprint of the data in data.json; later, check that each unfinished stage's data still match it.

    Moved shards are fine. A stage without a checkpoint needs this, since it would train on whatever its shard
    patterns match now. A collective. Raises ValueError that names the stage and a shard that has changed.
    """
    path = config.run_dir / "data.json"
    before = _read_noted(path) if path.exists() else {}
    world.barrier()  # rank 0 rewrites the file below, so all ranks must have read it
    done = {name: noted for name, noted in before.items() if is_stage_done(config.run_dir / name)}
    for name, noted in before.items():
        if name in data and name not in done and not _reads_others(noted, config, name):
            _compare(name, noted, data[name])
    now = {name: _all_noted(one, config, name) for name, one in data.items()} | done
    if world.is_main and now != before:
        with checksums.listing(path):
            write_text(path, dumps(now, indent=1))


def _all_noted(data: Data, config: Config, stage: str) -> dict[str, Any]:
    patterns = config.data_of(stage).train
    return {part: _noted(loader) for part, loader in data.parts().items()} | {"patterns": patterns}


def _noted(loader: Loader) -> dict[str, Any]:
    index = loader.index
    shards = {shard: stamp.digest for shard, stamp in zip(index.shards, index.stamps, strict=True)}
    return {"samples": len(loader.numbers), "fingerprint": loader.fingerprint, "shards": shards}


def _reads_others(noted: Mapping[str, Any], config: Config, stage: str) -> bool:
    """True if a stage that has not begun now names other shards, by more than their folder, than data.json has."""
    patterns = config.data_of(stage).train
    same = configs.without_folders(noted.get("patterns", patterns)) == configs.without_folders(patterns)
    return not same and not is_begun(config.run_dir / stage)


def _read_noted(path: Path) -> dict[str, Any]:
    """Read the data fingerprints that a run recorded. Raises ValueError if the file is corrupt."""
    remedy = "restore it, or remove it: the samples that are there now are then taken for those it began with"
    checksums.check_file(path, remedy)
    try:
        noted: dict[str, Any] = strict_json.read(path)
        # older versions recorded only the training samples, by places and sizes of the shards
        noted = {name: one if "train" in one else {"train": {**one, "shards": {}}} for name, one in noted.items()}
        if not all(_is_noted(one[part]) for one in noted.values() for part in ("train", "heldout") if part in one):
            raise ValueError("not samples, a fingerprint and shards")
        return noted
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what was written ({error!r}): {remedy}") from None


def _is_noted(part: Mapping[str, Any]) -> bool:
    shards = part["shards"]
    digests = isinstance(shards, dict) and all(isinstance(digest, str) for digest in shards.values())
    return digests and isinstance(part["samples"], int) and isinstance(part["fingerprint"], str)


def _compare(stage: str, before: Mapping[str, Any], data: Data) -> None:
    """Raises ValueError if the recorded data `before` of `stage` are not the present `data`."""
    for part, loader in data.parts().items():
        noted = before.get(part)
        if noted and noted["fingerprint"] not in (loader.fingerprint, loader.layout):
            which = _which(noted["shards"], _noted(loader)["shards"])
            raise ValueError(
                f"stages.{stage}: the run began with {noted['samples']:,} samples of data.{part}, and finds "
                f"{len(loader.numbers):,}, not all of them the same{which}: "
                "restore its shards, or use --overwrite"
            )


def _which(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Name, for a message, the first shard in `now` (name to digest) that differs from `before`, or is missing now."""
    names = {Path(shard).name for shard in before}
    for shard, digest in now.items():
        if before and digest not in before.values():
            return f" ({shard} {'has changed' if Path(shard).name in names else 'was not among them'})"
    return next((f" ({shard} is gone)" for shard, digest in before.items() if digest not in now.values()), "")
