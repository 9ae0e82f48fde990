"""What every rank tells of itself with its votes: how long it waited for data, and how much memory it has held.

Votes are added up over ranks, so each rank writes into columns of its own, which are zero on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from hive_scale.device import peaks
from hive_scale.distributed import World


def rank_report(world: World, waited: float) -> list[float]:
    """A row for every rank, one after the other; only this rank's is not zero. `waited` is in seconds."""
    own = [waited, *peaks(world.device).values()]
    rows = [[0.0] * len(own) for _ in range(world.size)]
    rows[world.rank] = [float(value) for value in own]
    return [value for row in rows for value in row]


def read_reports(told: Sequence[float], world: World) -> tuple[list[float], dict[str, float]]:
    """From the sum of what all have told: waits by rank, in seconds, and for metrics the fullest ranks' memory."""
    names = ["waited", *peaks(world.device)]
    columns = {name: list(told[place :: len(names)]) for place, name in enumerate(names)}
    waits = columns.pop("waited")
    return waits, {f"{name}_gb": round(max(held) / 1e9, 4) for name, held in columns.items()}
