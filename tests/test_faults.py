"""Part of the fault sweep, small enough for every commit; `make faults` runs all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from faults.sweep import FAULTS, left_alone, trial

TRIALS = [
    ("FSDP2", "SIGTERM to one rank"),
    ("FSDP2", "kill -9, newest checkpoint damaged"),
    pytest.param("FSDP2", "kill -9 of one rank", marks=pytest.mark.slow),
    pytest.param("FSDP2", "disk full", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return left_alone(tmp_path_factory.mktemp("faults"), {"FSDP2"})


@pytest.mark.parametrize(("engine", "fault"), TRIALS)
def test_a_disturbed_run_ends_as_one_left_alone(alone: dict[str, Path], engine: str, fault: str) -> None:
    place = alone[engine].parents[1]
    result = trial(place, 1000 + list(FAULTS).index(fault), alone, fault, engine)
    assert not result.wrong, result


def test_a_night_in_virtual_time_loses_steps_only_to_failures() -> None:
    script = Path(__file__).parent / "faults" / "night.py"
    words = ["--preset", "debug", "--hours", "1", "--nights", "3", "--failures", "0", "20000"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith(("| 0 ", "| 20000 "))]
    (calm, stormy) = ({"lost": float(row[2]), "starts": float(row[1])} for row in rows)
    assert calm == {"lost": 0, "starts": 1}
    assert stormy["starts"] > 1
