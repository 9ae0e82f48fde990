"""The step checkpoints of one stage: written while training goes on, published whole or not at all, verified.

Every rank writes the ranges it owns to ``step_*.tmp``; the manifest with all checksums comes last, then one
rename publishes the directory. Nothing else says which checkpoint is newest: `Checkpointer.latest` looks and verifies.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import inf, isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hive_scale.checkpoint.format import (
    OwnedRange,
    Shape,
    StepCheckpoint,
    audit,
    by_parameter,
    difference,
    directory_name,
    divide,
    key_of,
    owned_ranges,
    shapes_of,
    step_of,
    steps_in,
    tensor_name,
    write_manifest,
)
from hive_scale.checkpoint.io import CorruptFile, safetensors_header, sync_directory, write_file
from hive_scale.config import KeepConfig
from hive_scale.device import pins_memory, synchronize
from hive_scale.distributed import Fragment, World
from hive_scale.exit_codes import TryAgain
from hive_scale.strict_json import dumps


class Retention:
    """Which of a stage's step checkpoints stay, as `KeepConfig` says."""

    def __init__(self, directory: Path, keep: KeepConfig) -> None:
        self.directory, self.keep = directory, keep
        self._refused: set[Path] = set()  # found damaged
        self._losses: dict[Path, float] = {}  # held-out ones

    def refused(self, path: Path) -> None:
        """Do not count `path` any longer: it is damaged."""
        self._refused.add(path)

    def saved(self, path: Path, state: Mapping[str, Any]) -> None:
        """`path` has just been written: delete what need not stay, up to its step. It stays itself, always."""
        self._refused.discard(path)
        self._losses[path] = _loss_of(state)
        reached = [found for found in steps_in(self.directory) if step_of(found) <= step_of(path)]
        kept = self._kept([found for found in reached if found not in self._refused])
        for found in reached:
            if found not in kept:
                shutil.rmtree(found, ignore_errors=True)  # what cannot be deleted now is tried again next time

    def _kept(self, sound: list[Path]) -> set[Path]:
        kept = {*sound[-self.keep.last :]}
        kept |= {path for path in sound if self.keep.every and step_of(path) % self.keep.every == 0}
        if self.keep.best:
            rated = [path for path in sound if isfinite(self._loss(path))]
            kept |= {*sorted(rated, key=self._loss)[:1]}
        return kept

    def _loss(self, path: Path) -> float:
        """The held-out loss that a checkpoint was saved with, or infinity."""
        if path not in self._losses:
            try:
                self._losses[path] = _loss_of(StepCheckpoint(path).state)
            except CorruptFile:
                return inf
        return self._losses[path]


def _loss_of(state: Mapping[str, Any]) -> float:
    loss = state.get("eval_loss")
    return inf if loss is None else float(loss)


class Staging:
    """Who writes what does not change within a stage, so it is worked out once; so is the one buffer."""

    def __init__(self, tables: Sequence[Sequence[OwnedRange]], world: World) -> None:
        """`tables` says what each rank owns. Raises ValueError if that is not the whole of every tensor."""
        self.world = world
        self.table = list(tables[world.rank])
        self.shapes = shapes_of(tables)
        self.pieces = divide(tables, world.rank)
        lengths = [piece.range.length for piece in self.pieces]
        # pinned, so that copies from a GPU are fast; kept, so that only the first save allocates
        self.buffer = torch.empty(sum(lengths), pin_memory=pins_memory(world.device))
        self._parts = torch.split(self.buffer, lengths)
        specs = [(tensor_name(piece.range), torch.float32, (piece.range.length,)) for piece in self.pieces]
        self._header = safetensors_header(specs, {})

    @torch.no_grad()
    def fill(self, fragments: Sequence[Fragment]) -> None:
        """Copy this rank's share. Raises RuntimeError if the rank owns other ranges than at first."""
        if owned_ranges(fragments) != self.table:
            raise RuntimeError("the ranges that this rank owns have changed since the stage's first checkpoint")
        for part, piece in zip(self._parts, self.pieces, strict=True):
            source = fragments[piece.source].data
            part.copy_(source[piece.start : piece.start + piece.range.length], non_blocking=True)
        synchronize(self.world.device)

    def write(self, directory: Path) -> tuple[str, dict[str, Any]] | None:
        """Write the share into `directory`; the file's (name, entry in the manifest), None if there is no share."""
        if not self.pieces:
            return None
        path = directory / f"rank_{self.world.rank:05d}.safetensors"
        checksum = write_file(path, self._header, [lambda: self.buffer])
        ranges = [piece.range for piece in self.pieces]
        return path.name, {"bytes": path.stat().st_size, "xxh3_128": checksum, "ranges": ranges}


LAST_TWO = KeepConfig()
log = logging.getLogger(__name__)
T = TypeVar("T")


class WriteError(TryAgain):
    """A checkpoint could not be written; every rank gets the same message."""


class Checkpointer:
    """Every method is a collective: all ranks call it, and all return or all raise."""

    def __init__(self, directory: Path, world: World, keep: KeepConfig = LAST_TWO, max_failures: int = 3) -> None:
        """Of written checkpoints those stay that `keep` says; the `max_failures`-th failed write in a row is fatal."""
        self.directory, self.world, self.max_failures = directory, world, max_failures
        # the writer thread talks on a group of its own: it must never meet a collective of the training
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures = 0
        self._newest: Path | None = None
        self._sound: set[Path] = set()  # written or verified here
        self._retention = Retention(directory, keep)
        self._staging: Staging | None = None
        self.write_seconds = 0.0  # that the last checkpoint took to reach the disk

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any], wait: bool = False) -> None:
        """Write a checkpoint; returns when the fragments are copied, or with `wait` when they are on disk.

        `state` is plain JSON and the same on all ranks (rank 0's is kept); its "eval_loss" says which is best. A
        save that finds the last one unfinished waits for it. A failed write is logged and the next save tries
        again; the `max_failures`-th in a row raises WriteError here, as does any failure with `wait`.
        """
        # one write at a time: a disk slower than the interval between saves holds training up here, and nowhere else
        error = self._settle()
        if error and self._failures >= self.max_failures:
            raise WriteError(f"{self._failures} checkpoints in a row could not be written: {error}") from error
        if self._path(step) in self._sound:
            return
        text = dumps(state)  # now, since the caller may change it while the writer is at work
        self._pending = self._writer.submit(self._write, step, self._stage(list(fragments)), text)
        if wait:
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the write under way; the newest sound checkpoint here. Raises WriteError if that write failed."""
        if error := self._settle():
            raise error
        return self._newest

    def latest(self) -> Path | None:
        """The newest checkpoint whose every checksum agrees, or None where there is no checkpoint at all.

        CorruptFile ones are refused and logged. Raises CorruptFile if all are: starting over must be a decision.
        """
        self._settle()
        refusals = []
        for path in reversed(self._gather(self._listing())[0]):
            reason = self._damage(path)
            if not reason:
                self._sound.add(path)
                self._newest = path
                return path
            refusals.append(f"{path.name}: {reason}")
            self._log(logging.WARNING, "checkpoint %s refused: %s", path, reason)
        if refusals:
            raise CorruptFile(
                f"no checkpoint in {self.directory} is sound ({'; '.join(refusals)}): "
                "restore one, or remove them all to start the stage over"
            )
        return None

    def load(self, path: Path, fragments: Iterable[Fragment]) -> dict[str, Any]:
        """Fill the fragments' memory, on any number of ranks; returns the state that was saved.

        Raises CorruptFile if a checksum disagrees, ValueError naming the parameters if it is another model's.
        """
        self._settle()
        fragments = list(fragments)
        if path not in self._sound and (reason := self._damage(path)):
            raise CorruptFile(f"{path} refused: {reason}")
        self._sound.add(path)
        snapshot = StepCheckpoint(path)
        wanted = shapes_of(self._gather(owned_ranges(fragments)))
        # first by parameter, since three kinds of each would bury the message
        differs = difference(by_parameter(snapshot.shapes), by_parameter(wanted)) or difference(snapshot.shapes, wanted)
        if differs:
            raise ValueError(f"{path} holds another model's state: {differs}")
        self._together(lambda: _read(snapshot, fragments), CorruptFile)
        return snapshot.state

    # --------------------------------------------------------------- on the caller's thread

    def _stage(self, fragments: list[Fragment]) -> Staging:
        if self._staging is None:
            self._staging = Staging(self._gather(owned_ranges(fragments)), self.world)
        self._staging.fill(fragments)
        return self._staging

    def _settle(self) -> WriteError | None:
        """Wait for the write under way and count; returns why it failed."""
        if self._pending is None:
            return None
        error = self._pending.exception()
        self._pending = None
        if error is None:
            self._failures = 0
            return None
        self._failures += 1
        if isinstance(error, WriteError):
            return error
        failure = WriteError(f"checkpoint not written: {error!r}")
        failure.__cause__ = error  # which may be the loss of a rank
        return failure

    def _damage(self, path: Path) -> str:
        """Why `path` cannot be trusted, or ""; the ranks share the reading."""
        reason = next(filter(None, self._gather(audit(path, self.world.rank, self.world.size))), "")
        if reason:
            self._retention.refused(path)
        return reason

    def _listing(self) -> list[Path]:
        for left in self.directory.glob("step_*.tmp"):
            self._log(logging.WARNING, "checkpoint %s was never finished and is ignored", left)
        return steps_in(self.directory)

    # --------------------------------------------------------------- on the writer's thread

    def _write(self, step: int, staging: Staging, state: str) -> None:
        final, began = self._path(step), time.monotonic()
        partial = final.with_name(f"{final.name}.tmp")
        try:
            # under another name until every rank has written, so that what is there under its own is whole
            self._together(lambda: self._begin(partial))
            files = dict(filter(None, self._together(lambda: staging.write(partial))))
            self._together(lambda: self._publish(partial, final, staging.shapes, files, json.loads(state)))
        except Exception as error:
            self._log(logging.ERROR, "checkpoint of step %d not written: %s", step, error)
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise
        self._sound.add(final)
        self._newest = final
        self.write_seconds = time.monotonic() - began

    def _begin(self, partial: Path) -> None:
        if not self.world.is_main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob("step_*.tmp"):  # by a run that was killed
            shutil.rmtree(left)
        partial.mkdir()

    def _publish(
        self, partial: Path, final: Path, shapes: dict[str, Shape], files: dict[str, Any], state: dict[str, Any]
    ) -> None:
        if not self.world.is_main:
            return
        # the manifest, the directory's entries and the rename in this order: after a crash the name is there with all
        # that belongs to it, or not at all
        write_manifest(partial, step_of(final), shapes, files, state)
        sync_directory(partial)
        if final.exists():  # not sound, or `save` had returned
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(self.directory)
        self._retention.saved(final, state)

    # --------------------------------------------------------------- among the ranks

    def _together(self, action: Callable[[], T], failure: type[Exception] = WriteError) -> list[T]:
        """Every rank's result, by rank. Raises `failure` on all ranks if the action failed on any."""
        try:
            outcome: tuple[Any, str] = (action(), "")
        except Exception as error:
            outcome = (None, f"rank {self.world.rank}: {error}")
        outcomes = self._gather(outcome)
        if failed := [message for _, message in outcomes if message]:
            raise failure("; ".join(failed))
        return [result for result, _ in outcomes]

    def _gather(self, value: T) -> list[T]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _path(self, step: int) -> Path:
        return self.directory / directory_name(step)

    def _log(self, level: int, message: str, *values: object) -> None:
        if self.world.is_main:
            log.log(level, message, *values)


def _read(snapshot: StepCheckpoint, fragments: Iterable[Fragment]) -> None:
    for fragment in fragments:
        snapshot.read(key_of(fragment), fragment.offset, fragment.data)
