"""A bad batch leaves no trace: weights and moments are, bit for bit, those of a run that never saw it."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import ranks
from test_parity import Cell, my_batches, opened, small_jsons

from hive_scale.distributed import World
from hive_scale.engine import Engine

CELLS = [Cell("ddp"), Cell("fsdp"), Cell("zero1"), Cell("zero2_offload"), Cell("zero2", precision="bf16")]


def digest(engine: Engine) -> str:
    parts = hashlib.sha256()
    for fragment in engine.fragments():
        parts.update(repr(fragment[:4]).encode())
        parts.update(fragment.data.numpy().tobytes())
    return parts.hexdigest()


def left_out(world: World, cells: list[Cell], folder: str) -> list[tuple[str, str]]:
    """Of each cell, the state after three good steps, and after the same with bad ones between."""
    return [(train(world, cell, folder, bad=False), train(world, cell, folder, bad=True)) for cell in cells]


def train(world: World, cell: Cell, folder: str, bad: bool) -> str:
    engine: Any = opened(cell, world, folder)[0]
    for step in range(3):
        output = engine.step(my_batches(cell, step, world), 1.0, votes=lambda: (world.rank, 1))
        assert output.taken
        assert output.votes == (1.0, 2.0)
        if not bad:
            continue
        after = engine.step(my_batches(cell, 10 + step, world), 1.0, max_loss=output.loss / 2)
        assert not after.taken
        assert math.isfinite(after.grad_norm)
        loss = engine._loss
        if world.rank == 1:  # and no other
            engine._loss = lambda batch: loss(batch) * math.nan  # noqa: B023
        after = engine.step(my_batches(cell, 20 + step, world), 1.0)
        engine._loss = loss
        assert not after.taken
        assert math.isnan(after.loss)
        assert math.isnan(after.grad_norm)
    return digest(engine)


@pytest.mark.parametrize("cells", [CELLS, [Cell("zero3"), Cell("zero3_offload", precision="bf16")]], ids=["", "zero3"])
def test_a_step_left_out_changes_no_bit(cells: list[Cell], tmp_path: Path) -> None:
    small_jsons(tmp_path)
    for states in ranks.run(left_out, 2, cells, str(tmp_path)):
        for cell, (without, with_bad) in zip(cells, states, strict=True):
            assert without == with_bad, cell
