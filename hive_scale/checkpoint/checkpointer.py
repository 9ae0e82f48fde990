"""Step checkpoints of one stage: written in the background, published atomically, and verified before use.

Every rank writes ranges that it owns to ``step_*.tmp``. The manifest with all checksums is written last, then one
rename publishes the directory. No file names the newest checkpoint: `Checkpointer.latest` lists and verifies them.
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
    difference,
    directory_name,
    divide,
    key_of,
    kinds_in,
    masters_in,
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
    """Deletes step checkpoints of a stage that `KeepConfig` does not keep."""

    def __init__(self, directory: Path, keep: KeepConfig) -> None:
        self.directory, self.keep = directory, keep
        self._refused: set[Path] = set()  # corrupt checkpoints
        self._losses: dict[Path, float] = {}  # held-out loss by checkpoint

    def refused(self, path: Path) -> None:
        """Stop counting `path` among those to keep: it is corrupt."""
        self._refused.add(path)

    def saved(self, path: Path, state: Mapping[str, Any]) -> None:
        """Delete checkpoints that need not be kept, up to the step of `path`. `path` was just written, and stays."""
        self._refused.discard(path)
        self._losses[path] = _loss_of(state)
        reached = [found for found in steps_in(self.directory) if step_of(found) <= step_of(path)]
        kept = self._kept([found for found in reached if found not in self._refused])
        for found in reached:
            if found not in kept:
                shutil.rmtree(found, ignore_errors=True)  # a deletion that fails is tried again after the next save

    def _kept(self, sound: list[Path]) -> set[Path]:
        kept = {*sound[-self.keep.last :]}
        kept |= {path for path in sound if self.keep.every and step_of(path) % self.keep.every == 0}
        if self.keep.best:
            rated = [path for path in sound if isfinite(self._loss(path))]
            kept |= {*sorted(rated, key=self._loss)[:1]}
        return kept

    def _loss(self, path: Path) -> float:
        """The held-out loss recorded in a checkpoint; infinity if there is none."""
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
    """This rank's share of every checkpoint of a stage, with layout and buffer that are made once."""

    def __init__(self, tables: Sequence[Sequence[OwnedRange]], world: World) -> None:
        """`tables` has each rank's owned ranges. Raises ValueError if together they do not cover every tensor."""
        self.world = world
        self.table = list(tables[world.rank])
        self.shapes = shapes_of(tables)
        self.pieces = divide(tables, world.rank)
        lengths = [piece.range.length for piece in self.pieces]
        # pinned, for fast copies from a GPU; allocated once, and reused by every save
        self.buffer = torch.empty(sum(lengths), pin_memory=pins_memory(world.device))
        self._parts = torch.split(self.buffer, lengths)
        specs = [(tensor_name(piece.range), torch.float32, (piece.range.length,)) for piece in self.pieces]
        self._header = safetensors_header(specs, {})

    @torch.no_grad()
    def fill(self, fragments: Sequence[Fragment]) -> None:
        """Copy this rank's share into the buffer. Raises RuntimeError if the rank's ranges have changed."""
        if owned_ranges(fragments) != self.table:
            raise RuntimeError("the ranges that this rank owns have changed since the stage's first checkpoint")
        for part, piece in zip(self._parts, self.pieces, strict=True):
            source = fragments[piece.source].data
            part.copy_(source[piece.start : piece.start + piece.range.length], non_blocking=True)
        synchronize(self.world.device)

    def write(self, directory: Path) -> tuple[str, dict[str, Any]] | None:
        """Write the share into `directory`. Returns (file name, manifest entry), or None if the share is empty."""
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
    """Writing a checkpoint failed. Every rank raises it with the same message."""


class Checkpointer:
    """Saves, finds and loads step checkpoints. Every method is a collective: all ranks return, or all raise."""

    def __init__(self, directory: Path, world: World, keep: KeepConfig = LAST_TWO, max_failures: int = 3) -> None:
        """`keep` sets which checkpoints are kept; the `max_failures`-th failed write in a row is fatal."""
        self.directory, self.world, self.max_failures = directory, world, max_failures
        # the writer thread has a process group of its own, so that its collectives never mix with the training's
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures = 0
        self._newest: Path | None = None
        self._sound: set[Path] = set()  # checkpoints written or verified by this process
        self._retention = Retention(directory, keep)
        self._staging: Staging | None = None
        self.write_seconds = 0.0  # duration of the last write to disk

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any], wait: bool = False) -> None:
        """Write a checkpoint. Returns once the fragments are copied, or with `wait`, once they are on disk.

        `state` is JSON, and the same on all ranks (rank 0's is written); its "eval_loss" decides which is best. If the
        previous write is unfinished, this waits for it. A failed write is logged, and the next save tries again; the
        `max_failures`-th in a row raises WriteError, as does any failure with `wait`.
        """
        # only one write at a time: a disk slower than the save interval delays training here, and nowhere else
        error = self._settle()
        if error and self._failures >= self.max_failures:
            raise WriteError(f"{self._failures} checkpoints in a row could not be written: {error}") from error
        if self._path(step) in self._sound:
            return
        text = dumps(state)  # serialised now, since the caller may change it during the write
        self._pending = self._writer.submit(self._write, step, self._stage(list(fragments)), text)
        if wait:
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the unfinished write. Returns the newest sound checkpoint known; raises WriteError if it failed."""
        if error := self._settle():
            raise error
        return self._newest

    def latest(self) -> Path | None:
        """The newest checkpoint whose checksums all match, or None if there are no checkpoints.

        Corrupt ones are logged and skipped. Raises CorruptFile if all are corrupt: starting over must be the user's
        decision.
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
        """Read a checkpoint into the fragments, on any number of ranks. Returns its state.

        Raises CorruptFile if a checksum does not match, ValueError that names the parameters if shapes differ.
        """
        self._settle()
        fragments = list(fragments)
        if path not in self._sound and (reason := self._damage(path)):
            raise CorruptFile(f"{path} refused: {reason}")
        self._sound.add(path)
        snapshot = StepCheckpoint(path)
        wanted = shapes_of(self._gather(owned_ranges(fragments)))
        # compared by parameter first: each has several tensors, which would make the message as many times longer
        if differs := difference(masters_in(snapshot.shapes), masters_in(wanted)):
            raise ValueError(f"{path} holds another model's state: {differs}")
        if differs := difference(snapshot.shapes, wanted):
            stored, asked = (", ".join(kinds_in(shapes)) or "nothing" for shapes in (snapshot.shapes, wanted))
            raise ValueError(
                f"{path} holds another optimizer's state, {stored} and not {asked}: set the stage's optimizer and ema "
                f"to what it began with, or use --overwrite ({differs})"
            )
        self._together(lambda: _read(snapshot, fragments), CorruptFile)
        return snapshot.state

    # --------------------------------------------------------------- on the caller's thread

    def _stage(self, fragments: list[Fragment]) -> Staging:
        if self._staging is None:
            self._staging = Staging(self._gather(owned_ranges(fragments)), self.world)
        self._staging.fill(fragments)
        return self._staging

    def _settle(self) -> WriteError | None:
        """Wait for the unfinished write, and count failures in a row. Returns the error, if it failed."""
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
        failure.__cause__ = error  # kept, since it may be the loss of a rank, which has its own exit code
        return failure

    def _damage(self, path: Path) -> str:
        """Why the checkpoint at `path` is corrupt, or "". Each rank verifies a share of the files."""
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
            # under a temporary name until all ranks have written, so that a published checkpoint is complete
            self._together(lambda: self._begin(partial))
            files = dict(filter(None, self._together(lambda: staging.write(partial))))
            self._together(lambda: self._publish(partial, final, staging.shapes, files, json.loads(state)))
        except Exception as error:
            self._log(logging.ERROR, "checkpoint of step %d not written: %s", step, error)
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)  # frees the room, since the disk may be full
            raise
        self._sound.add(final)
        self._newest = final
        self.write_seconds = time.monotonic() - began

    def _begin(self, partial: Path) -> None:
        if not self.world.is_main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob("step_*.tmp"):  # left by a killed run
            shutil.rmtree(left)
        partial.mkdir()

    def _publish(
        self, partial: Path, final: Path, shapes: dict[str, Shape], files: dict[str, Any], state: dict[str, Any]
    ) -> None:
        if not self.world.is_main:
            return
        # manifest, sync, rename, sync, in this order: after a crash the published name is there with all its files, or
        # not at all
        write_manifest(partial, step_of(final), shapes, files, state)
        sync_directory(partial)
        if final.exists():  # a corrupt one, since `save` skips steps that are saved and sound
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(self.directory)
        self._retention.saved(final, state)

    # --------------------------------------------------------------- among the ranks

    def _together(self, action: Callable[[], T], failure: type[Exception] = WriteError) -> list[T]:
        """Run `action` on every rank, and return all results, by rank. Raises `failure` everywhere if one failed."""
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
