"""One rank's share of the checkpoints: copied aside in a moment, so that it can be written while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hive_scale.checkpoint.files import safetensors_header, write_file
from hive_scale.checkpoint.ranges import Owned, divide, owned, shapes_of
from hive_scale.checkpoint.snapshot import tensor_name
from hive_scale.device import pins_memory, synchronize
from hive_scale.distributed import Fragment, World


class Staging:
    """Who writes what does not change within a stage, so it is worked out once; so is the one buffer."""

    def __init__(self, tables: Sequence[Sequence[Owned]], world: World) -> None:
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
        if owned(fragments) != self.table:
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
