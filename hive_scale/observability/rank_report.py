"""Per-rank values sent along with the votes of a step: seconds waited for data, and peak memory.

Votes are summed over ranks, so each rank writes into its own columns, which are zero on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from hive_scale.device import peaks
from hive_scale.distributed import World


def rank_report(world: World, waited: float) -> list[float]:
    """Return one row per rank, concatenated; only this rank's is not zero. `waited` is in seconds."""
    own = [waited, *peaks(world.device).values()]
    rows = [[0.0] * len(own) for _ in range(world.size)]
    rows[world.rank] = [float(value) for value in own]
    return [value for row in rows for value in row]


def read_reports(told: Sequence[float], world: World) -> tuple[list[float], dict[str, float]]:
    """Decode the sum of all reports: waits by rank in seconds, and the fullest rank's peak memory in GB by name."""
    names = ["waited", *peaks(world.device)]
    columns = {name: list(told[place :: len(names)]) for place, name in enumerate(names)}
    waits = columns.pop("waited")
    return waits, {f"{name}_gb": round(max(held) / 1e9, 4) for name, held in columns.items()}
