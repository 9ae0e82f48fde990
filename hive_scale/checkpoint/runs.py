"""A run's directory, read: its config, the weights of its stages, and whether all that is there is sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from hive_scale import config as configs
from hive_scale.checkpoint.handoff import read_weights
from hive_scale.checkpoint.marker import WEIGHTS, find_weights
from hive_scale.checkpoint.snapshot import Snapshot, audit, steps_in

CONFIG = "config.yaml"
INITIAL = "initial"  # what the first stage starts from


class Run:
    """`config` is the one that the run was started with; `dir` may have been moved since."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError if `directory` holds no run."""
        if not (directory / CONFIG).is_file():
            raise ValueError(
                f"{directory} is no run, for it has no {CONFIG} (a stage is not a run): give the directory that "
                "output= named"
            )
        self.dir, self.config = directory, configs.load(directory / CONFIG)

    def finished(self) -> list[str]:
        """The stages that are done, in their order."""
        return [stage for stage in self.config.stages if find_weights(self.weights(stage))]

    def stage(self, name: str = "") -> str:
        """`name`, or the last stage that is done. Raises ValueError if there is none, or it is not done."""
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
        return self.dir / stage / WEIGHTS


class Finding(NamedTuple):
    path: Path
    damage: str  # or "", if it is sound


def verify(run: Run) -> Iterator[Finding]:
    """Read everything that a run goes on from or leaves: weights, checkpoints and encoders, stage by stage.

    Weights and checkpoints must match their checksums and come from the weights of the stage before.
    """
    parent = ""
    for stage in (INITIAL, *run.config.stages):
        directory = run.dir / stage
        for checkpoint in steps_in(directory):
            yield Finding(checkpoint, audit(checkpoint) or _stranger(Snapshot(checkpoint).state.get("parent"), parent))
        if found := find_weights(directory / WEIGHTS):
            identity, damage = "", ""
            try:
                weights = read_weights(found)
                identity = weights.identity
                damage = _stranger(weights.metadata.get("parent", ""), parent)
            except ValueError as error:
                damage = str(error)
            yield Finding(found, damage)
            parent = identity
        if (directory / "encoder").is_dir():
            yield Finding(directory / "encoder", _unreadable(directory / "encoder"))


def _stranger(named: str | None, parent: str) -> str:
    return "" if named == parent else "it does not come from the weights of the stage before"


def _unreadable(directory: Path) -> str:
    """Why a Hugging Face directory cannot be loaded, or ""; its files have no checksums."""
    try:
        for path in directory.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                file.keys()
    except (SafetensorError, OSError) as error:
        return f"{path.name} cannot be read: {error}"
    complete = (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))
    return "" if complete else "config.json or weights are missing"
