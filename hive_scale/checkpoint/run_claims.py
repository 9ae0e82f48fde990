"""Rules for starting, resuming, moving aside and deleting the run in a directory. docs/runs.md has them as a table."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from itertools import count, pairwise
from pathlib import Path
from typing import Literal

from hive_scale import checksums
from hive_scale import config as configs
from hive_scale.atomic import write_text
from hive_scale.checkpoint.format import directory_name, steps_in
from hive_scale.checkpoint.stage_files import WEIGHTS, find_weights, index_of, is_stage_done
from hive_scale.config import TAKEN, Config
from hive_scale.distributed import World
from hive_scale.resilience.run_lock import Lock
from hive_scale.rundir import BEGAN, CONFIG, EARLY, MARKER, fits, look, read_marker
from hive_scale.strangers import some
from hive_scale.strict_json import dumps

Overwrite = bool | Literal["delete"]  # True: what is there is moved aside
FORMAT = 1  # of a run directory
# what else a run directory may hold: by name, since an attention_notes.pdf is the user's
LATE = (
    "report.html",
    "attention.svg",
    "gradients.svg",
    "gradients.json",
    "gradients_over_training*.svg",
    ".*.tmp",
    ".nfs*",
)
LOGS = ("rank_[0-9]*.log", "tensorboard.log", "online.log", "offline.log", *LATE)
OF_STAGE = (
    *(BEGAN, checksums.SUMS, directory_name(0).replace("0", "[0-9]"), "step_[0-9]*.tmp", "metrics.jsonl"),
    *(WEIGHTS, index_of(Path(WEIGHTS)).name, "weights-[0-9]*-of-[0-9]*.safetensors", "weights*.safetensors*.tmp"),
    *("encoder", "memory.txt", "profile", "probes", "evaluation", *LATE),
)
logger = logging.getLogger(__name__)


def is_begun(stage_dir: Path) -> bool:
    """True if the stage has a checkpoint or final weights, from which it would resume."""
    return bool(steps_in(stage_dir)) or find_weights(stage_dir / WEIGHTS) is not None


# -- may this run go on here? ---------------------------------------------------------------------------------


def check_owner(config: Config, overwrite: Overwrite = False, follows: bool = False) -> None:
    """Raises ValueError if the run directory is not this run's, or its config was changed in a stage that has begun.

    With `overwrite`, it may hold another run. A run that `follows` another, such as the blank-image control, takes its
    config from there, so that it may differ from the saved one.
    """
    directory, state = config.run_dir, look(config.run_dir)
    if overwrite:
        if state == "foreign":
            raise ValueError(
                f"{directory} is no run, and not empty: --overwrite touches runs alone: choose another output, or move "
                "away yourself what is there"
            )
        if state == "ours":
            _check_overwrite(config, overwrite)
        return
    if state == "foreign":
        _check_foreign(config)
    if state == "ours":
        _check_format(directory)
        _check_links(config)
        _check_plan(config, follows)


def _check_foreign(config: Config) -> None:
    directory = config.run_dir
    mine = [CONFIG, "data.json", "initial", "blank", *config.stages, BEGAN, WEIGHTS]  # the last two mark a stage
    if found := [name for name in mine if os.path.lexists(directory / name)]:
        raise ValueError(
            f"{directory} has {', '.join(found[:3])}, but is no run (a run has {MARKER}, or its own {CONFIG}): choose "
            f"another output, or restore the {CONFIG} that the run was begun with"
        )


def _check_format(directory: Path) -> None:
    found = read_marker(directory).get("format", FORMAT)
    if found != FORMAT:
        raise ValueError(f"{directory} is of format {found}, this version knows {FORMAT}: update hive_scale")


def _check_links(config: Config) -> None:
    """Raises ValueError for links in place of a run's files or stage folders: writing would change their targets."""
    directory = config.run_dir
    folders = [directory / name for name in ("initial", "logs", "slurm", *config.stages)]
    for path in (path for folder in (directory, *folders) if folder.is_dir() for path in folder.iterdir()):
        if path.is_symlink() and not path.is_dir() and ".safetensors" not in path.name:
            raise ValueError(f"{path} is a link to {os.readlink(path)}: put a file of the run's own in its place")
    for folder in folders:
        if folder.is_symlink() and folder.name in config.stages and (found := _others(folder.resolve(), OF_STAGE)):
            raise ValueError(f"{folder} is a link to a folder that holds {found[0]}: let it lead to one of its own")


def _check_plan(config: Config, follows: bool) -> None:
    """Raises ValueError unless the command's config agrees with config.yaml, and that with the stages begun."""
    saved = config.run_dir / CONFIG
    if not saved.is_file():
        raise ValueError(f"{saved} is missing: restore it, or use --overwrite")
    # shards of an unfinished run may have moved: `preflight.check_data_fingerprint` compares their content
    goes_on = not all(is_stage_done(config.run_dir / name) for name in config.stages)
    if not follows and (changed := configs.differences(config, _load(saved), goes_on)):
        raise ValueError(
            f"{config.run_dir} holds another run (other {some(changed)}): give output=DIR, or --overwrite; to "
            f"change a stage that has not begun, edit {saved} and go on with --config {saved}"
        )
    _check_begun(config)


def _check_begun(config: Config) -> None:
    """Raises ValueError if a stage that has begun differs from the config, or lacks the weights it started from."""
    directory, names = config.run_dir, list(config.stages)
    for folder in (path.parent for path in sorted(directory.glob(f"*/{BEGAN}"))):
        checksums.check_file(folder / BEGAN, f"restore it, or move {folder} and the folders of later stages away")
        began = _load(folder / BEGAN)
        if [folder.name] != list(began.stages)[-1:] or not is_begun(folder):
            continue  # a renamed copy of a stage, or one without any training yet
        changed = [f"stages.{folder.name}"]
        if folder.name in names:
            changed = configs.differences(_until(config, folder.name), began, moved=True)
        if changed:
            raise ValueError(
                f"stage {folder.name} has begun with other {some(changed)} than the config has now; what has "
                f"begun stays as it is: undo that change, or move {folder} and the folders of later stages away to "
                "train them again, or use --overwrite"
            )
    for before, after in pairwise(names):
        if is_begun(directory / after) and not find_weights(directory / before / WEIGHTS):
            raise ValueError(
                f"stage {after} has begun, but {directory / before / WEIGHTS}, which it began with, is not there: "
                f"restore it, or move {directory / after} and the folders of later stages away to train them again"
            )


def _load(file: Path) -> Config:
    try:
        return configs.load(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): restore it, or use --overwrite") from None


def _until(config: Config, stage: str) -> Config:
    """The part of the config that affects `stage`: without the stages after it."""
    names = list(config.stages)
    return replace(config, stages={name: config.stages[name] for name in names[: names.index(stage) + 1]})


# -- --overwrite ----------------------------------------------------------------------------------------------


def _check_overwrite(config: Config, overwrite: Overwrite) -> None:
    directory = config.run_dir
    real, here = directory.resolve(), Path.cwd().resolve()
    if here.is_relative_to(real):
        raise ValueError(f"--overwrite would move {directory} away with you in it: change to another directory first")
    if inner := [path.name for path in _others(directory, tuple(TAKEN)) if path.is_dir() and look(path) == "ours"]:
        raise ValueError(f"{directory} holds other runs, too ({', '.join(inner[:3])}): choose another output")
    for key, path in _paths(asdict(config)):
        if key in ("name", "output"):
            continue
        if Path(os.path.abspath(os.path.expanduser(path))).resolve().is_relative_to(real):
            raise ValueError(
                f"{key}={path} lies in {directory}, which --overwrite would move away: choose another output"
            )
    if overwrite == "delete" and (found := foreign_files(directory)):
        raise ValueError(
            f"{directory} holds what is no run's ({', '.join(found[:3])}): --overwrite=delete leaves it alone: move "
            "that away, or let --overwrite move all of it aside"
        )


def _paths(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, text) for every string in a config that may be a path."""
    if isinstance(node, str):
        path = node.rpartition(" x ")[2]  # shard patterns may have a weight in front
        if path and "://" not in path and path.isprintable():
            yield key, path
    elif isinstance(node, Mapping):
        for name, child in node.items():
            yield from _paths(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for child in node:
            yield from _paths(child, key)


def foreign_files(directory: Path) -> list[str]:
    """Paths in the run `directory` that no run creates, relative to it.

    Folders that only programs fill (wandb's, Slurm's, checkpoints, exports) are searched for ``.git`` only.
    """
    stages = {path.parent.name for path in directory.glob(f"*/{BEGAN}")}
    with suppress(ValueError, OSError):
        stages |= set(configs.load(directory / CONFIG).stages)
    found = _others(directory, (*TAKEN, *EARLY, MARKER, *stages, *LATE))
    for name in ("initial", *sorted(stages)):
        found += _others(directory / name, OF_STAGE)
    found += _others(directory / "logs", LOGS)
    for name in ("blank", "vlm"):
        if (directory / name).is_dir():
            found += [directory / name / one for one in foreign_files(directory / name)]
    found += [Path(at) / ".git" for at, folders, files in os.walk(directory) if ".git" in (*folders, *files)]
    return sorted({str(path.relative_to(directory)) for path in found})


def _others(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Paths in `folder` that match none of `patterns`. For a link none, since deleting removes only the link."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    return [path for path in folder.iterdir() if not fits(path.name, patterns)]


def is_again(directory: Path) -> bool:
    """True if an earlier attempt of this very command started the run there: overwriting would lose its steps.

    It is recognised by the restart counters of Slurm and torchrun; other ways of restarting are not noticed.
    """
    before = read_marker(directory).get("attempt")
    counts = before if isinstance(before, dict) else {}
    return any(isinstance(counts.get(name), int) and now > counts[name] for name, now in _attempt().items())


def _attempt() -> dict[str, int]:
    """Restart count of each launcher of this process, by job."""
    env, found = os.environ, dict[str, int]()
    if job := env.get("SLURM_JOB_ID"):
        found[f"slurm {env.get('SLURM_CLUSTER_NAME', '')} {job}"] = int(env.get("SLURM_RESTART_COUNT") or 0)
    if run := env.get("TORCHELASTIC_RUN_ID"):
        own = f" {socket.gethostname()} {os.getppid()}" if run == "none" else ""  # torchrun's default id is "none"
        found[f"torchrun {run}{own}"] = int(env.get("TORCHELASTIC_RESTART_COUNT") or 0)
    return found


# -- a run begins ---------------------------------------------------------------------------------------------


def claim_run_dir(
    config: Config, world: World, lock: Lock, overwrite: Overwrite = False, follows: bool = False
) -> None:
    """Mark the run directory as this run's; with `overwrite`, first move the existing run aside. A collective.

    Raises ValueError on all ranks if that fails, RuntimeError if another run takes the directory in between.
    """

    def act() -> None:
        directory, aside = config.run_dir, None
        if overwrite and look(directory) == "ours":
            aside = _set_aside(directory, lock)
        try:
            _mark(config, follows)
        except OSError:
            if aside:
                _put_back(directory, aside)
            raise
        lock.stay()
        if aside:
            _say(directory, aside, overwrite)

    on_main(world, act)


def _mark(config: Config, follows: bool) -> None:
    directory, saved = config.run_dir, config.run_dir / CONFIG
    if follows or not saved.is_file() or not saved.stat().st_size:
        with checksums.listing(saved):
            configs.save(config, saved)
    elif checksums.is_changed(saved):  # the user edited config.yaml: accept it, and renew its checksum
        with checksums.listing(saved):
            pass
    if not read_marker(directory):
        with checksums.listing(directory / MARKER):
            write_text(directory / MARKER, dumps({"format": FORMAT, "attempt": _attempt()}))


def begin_stage(config: Config, stage: str, world: World) -> None:
    """Record the config that `stage` starts with, unless the stage has begun. A collective."""

    def act() -> None:
        folder = config.run_dir / stage
        if not is_begun(folder):
            with checksums.listing(folder / BEGAN):
                configs.save(_until(config, stage), folder / BEGAN)

    on_main(world, act)


def on_main(world: World, act: Callable[[], object]) -> None:
    """Run `act` on rank 0 while the others wait. All ranks raise its ValueError; an OSError becomes a ValueError."""
    error = ""
    if world.is_main:
        try:
            act()
        except ValueError as refusal:
            error = str(refusal)
        except OSError as failure:
            place = failure.filename or "the run directory"
            error = f"{place}: {failure.strerror}: make room or give leave to write there, or choose another output"
    if error := world.of_main(error):
        raise ValueError(error)


def _set_aside(directory: Path, lock: Lock) -> Path:
    real = directory.resolve()  # resolved: if it is a link to a larger disk, link and run stay where they are
    aside = _unused(real.with_name(f"{real.name}.old-{datetime.now():%Y%m%d-%H%M%S}"))
    try:
        real.rename(aside)
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be moved to {aside} ({error.strerror}): move it yourself, or choose another output"
        ) from None
    try:
        owner = lock.take()
    except ValueError:
        _put_back(directory, aside)
        raise
    if owner:
        raise RuntimeError(f"{directory}, whose old run is now {aside}, is in use by {owner}: choose another output")
    return aside


def _put_back(directory: Path, aside: Path) -> None:
    real = directory.resolve()
    with suppress(OSError):  # if that fails, the old run stays aside, where its name tells what it is
        for path in real.iterdir() if real.exists() else ():
            path.unlink()  # first files of the new run, including its lock
        aside.rename(real)  # replaces the directory, which is empty now


def _say(directory: Path, aside: Path, overwrite: Overwrite) -> None:
    if overwrite != "delete":
        logger.warning("the run that %s held is now %s", directory, aside)
        return
    try:
        shutil.rmtree(aside)
        logger.warning("the run that %s held was removed", directory)
    except OSError as error:
        logger.warning("the run that %s held could not all be removed: %s", directory, error)


def _unused(path: Path) -> Path:
    tries = (path.with_name(f"{path.name}-{number}") if number else path for number in count())
    return next(one for one in tries if not os.path.lexists(one))
