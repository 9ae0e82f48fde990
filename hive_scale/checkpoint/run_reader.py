"""Read a run's directory: its config, its stages' weights, and whether everything in it is intact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from hive_scale import checksums
from hive_scale import config as configs
from hive_scale.checkpoint.format import MANIFEST, StepCheckpoint, audit, steps_in
from hive_scale.checkpoint.stage_files import ENCODER, WEIGHTS, find_weights
from hive_scale.checkpoint.weights import read_weights
from hive_scale.locate import check_there
from hive_scale.rundir import BEGAN, MARKER

CONFIG = "config.yaml"
INITIAL = "initial"  # folder of the weights that the first stage starts from
OWN = (CONFIG, "data.json", MARKER)  # files of the run itself, not of a stage
STRANGER = "it does not come from the weights of the stage before"
UNLISTED = "no checksums, an older version or another tool wrote it"


class Run:
    """A run on disk. `config` is its saved config; `dir` is where it lies now, even if it was moved."""

    def __init__(self, directory: Path) -> None:
        """Open a run. Raises ValueError if `directory` holds none, or its config is corrupt."""
        check_there(directory)
        if not (directory / CONFIG).is_file():
            raise ValueError(
                f"{directory} is no run, for it has no {CONFIG} (a stage is not a run): give the directory that "
                "output= named"
            )
        checksums.check_file(directory / CONFIG, configs.EDITED)
        self.dir, self.config = directory, configs.load(directory / CONFIG)

    def finished(self) -> list[str]:
        """Names of the finished stages, in order."""
        return [stage for stage in self.config.stages if find_weights(self.weights(stage))]

    def stage(self, name: str = "") -> str:
        """`name` if given, else the last finished stage. Raises ValueError if it is unknown or unfinished."""
        known = [*self.config.stages, INITIAL]
        if name and name not in known:
            left = [stage for stage in self.config.stages if stage not in self.finished()]
            raise ValueError(
                f"{self.dir} has no stage '{name}': there are {', '.join(known)} "
                f"(still to be done: {', '.join(left) or 'none'})"
            )
        wanted = name or next(reversed(self.finished()), "")
        if not wanted:
            raise ValueError(
                f"every stage of {self.dir} is still to be done, there is no finished stage: train it to its end, or "
                f"take what it began with, stage {INITIAL}"
            )
        if not find_weights(self.weights(wanted)):
            done = ", ".join(self.finished()) or "none"
            raise ValueError(f"stage {name} of {self.dir} is still to be done: finished are {done}")
        return wanted

    def weights(self, stage: str) -> Path:
        """Path of a stage's weights file; `find_weights` also finds its index."""
        return self.dir / stage / WEIGHTS


class Finding(NamedTuple):
    """The result of verifying one file or folder of a run."""

    path: Path
    damage: str  # what is wrong; "": sound
    remark: str = ""  # why a sound file could not be fully verified


def encoder_remedy(directory: Path) -> str:
    """How to restore the corrupt encoder `directory`, for an error message."""
    if find_weights(directory.parent / WEIGHTS):
        return f"remove {directory}, and the command that trained the run makes it again from the stage's weights"
    return checksums.REMEDY


def verify_path(path: Path) -> Iterator[Finding]:
    """What `verify_run` finds of the run at `path`, and of its twin and fine-tuning in it; or of an exported directory.

    Yields one `Finding` per file or folder. Raises ValueError if `path` is neither.
    """
    if not (path / CONFIG).is_file() and (checksums.is_listed(path) or (path / "config.json").is_file()):
        yield verify_directory(path)
        return
    try:
        run = Run(path)
    except checksums.CorruptFile as error:
        yield Finding(path / CONFIG, str(error))
        return
    yield from verify_run(run)
    for inner in ("blank", "vlm"):
        if (path / inner / CONFIG).is_file():
            yield from verify_path(path / inner)


def verify_run(run: Run) -> Iterator[Finding]:
    """Verify everything that a run has published, stage by stage: checkpoints, weights and encoders, then exports.

    Each file must match its checksum, and files may be neither missing nor added. Weights and checkpoints must come
    from the previous stage's weights.
    """
    for name in OWN:
        yield from _own(run.dir / name)
    parent = ""
    for stage in (INITIAL, *run.config.stages):
        directory = run.dir / stage
        yield from _own(directory / BEGAN)
        for checkpoint in steps_in(directory):
            yield Finding(checkpoint, audit(checkpoint) or _extra(checkpoint) or _stranger(checkpoint, parent))
        encoder = directory / ENCODER
        if found := find_weights(directory / WEIGHTS):
            identity, damage = "", ""
            try:
                weights = read_weights(found)
                identity = weights.identity
                damage = "" if weights.metadata.get("parent", "") == parent else STRANGER
            except ValueError as error:
                damage = str(error)
            yield Finding(found, damage)
            parent = identity
            if stage != INITIAL and not encoder.is_dir():
                yield Finding(encoder, "it is missing: the command that trained the run makes it again")
        elif encoder.is_dir() or (stage == INITIAL and run.finished()):
            yield Finding(directory / WEIGHTS, "they are missing, though a later step was made of them")
        if encoder.is_dir():
            yield verify_directory(encoder)
    for directory in (*sorted(run.dir.glob("export/*")), run.dir / "llava"):
        if directory.is_dir() and directory.suffix != ".tmp":  # .tmp is left by a killed command
            yield verify_directory(directory)


def verify_directory(directory: Path) -> Finding:
    """Verify a Hugging Face directory: by its checksums if it has them, else by opening its files."""
    if not checksums.is_listed(directory):
        damage = _unreadable(directory)
        return Finding(directory, damage, "" if damage else UNLISTED)
    damage = "; ".join(checksums.faults(directory)) or _named(checksums.unexpected(directory))
    return Finding(directory, damage)


def _own(path: Path) -> Iterator[Finding]:
    try:
        listed = checksums.read_sums(path.parent) if checksums.is_listed(path.parent) else {}
        checksums.check_file(path)
    except checksums.CorruptFile as error:
        yield Finding(path, str(error))
    else:
        if path.name in listed or path.is_file():  # older versions wrote no data.json
            yield Finding(path, "", "" if path.name in listed else UNLISTED)


def _stranger(checkpoint: Path, parent: str) -> str:
    return "" if StepCheckpoint(checkpoint).state.get("parent") == parent else STRANGER


def _extra(checkpoint: Path) -> str:
    there = {path.name for path in checkpoint.iterdir()}
    return _named(sorted(there - StepCheckpoint(checkpoint).files.keys() - {MANIFEST}))


def _named(unexpected: list[str]) -> str:
    return f"files that were not written with it: {', '.join(map(repr, unexpected))}" if unexpected else ""


def _unreadable(directory: Path) -> str:
    """Why a Hugging Face directory without checksums cannot be loaded, or ""."""
    try:
        for path in directory.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                file.keys()
    except (SafetensorError, OSError) as error:
        return f"{path.name} cannot be read: {error}"
    complete = (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))
    return "" if complete else "config.json or weights are missing"
