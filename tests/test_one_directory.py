"""What nodes see of one folder differs for a while on network file systems, and for good where it is no shared one.

Ranks that decide by what each sees go different ways, wait for each other in different collectives, and end minutes
later to be tried again; or they answer a question twice and another never. So one rank looks, and all are told.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
from test_exit_codes import small
from test_vqa_runner import LIMIT, Counting, ask

from hive_scale import pipeline
from hive_scale.distributed import World
from hive_scale.evaluate import easyvqa, probe_runner, vqa_runner
from hive_scale.evaluate.probe_runner import results_for_all
from hive_scale.evaluate.vqa_runner import answer_all
from hive_scale.pipeline import run_pipeline
from hive_scale.resilience import run_lock
from hive_scale.resilience.run_lock import locked


def at_home(world: World, folder: Path) -> str:
    """What a rank is told that meets the others in a directory of its own node."""
    os.chdir(folder / str(world.rank))
    run_lock.SEEN = 1.0
    try:
        with locked(Path("run"), world):
            return "held"
    except ValueError as error:
        return str(error)


def seen_late(world: World, folder: Path) -> str:
    """Rank 1 sees the directory some seconds after rank 0 has made it."""
    os.chdir(folder / str(world.rank))
    if world.rank == 1:
        threading.Timer(2.0, lambda: Path("run").symlink_to(folder / "0" / "run")).start()
    with locked(Path("run"), world):
        return "held"


@pytest.mark.parametrize("view", [at_home, seen_late])
def test_a_directory_that_is_not_one_for_all_is_refused_and_one_that_comes_late_is_waited_for(
    tmp_path: Path, view: Any
) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    told = ranks.run(view, 2, tmp_path, timeout=60)
    if view is seen_late:
        assert told == ["held", "held"]
        return
    assert told[0] == told[1]
    assert told[0].startswith("run is not one directory for all: rank 1 cannot see there what rank 0 has written: give")
    assert not (tmp_path / "0" / "run").exists()  # the next attempt may be by other nodes


def stale(world: World, folder: Path) -> tuple[list[str], Any]:
    """On rank 1 nothing is there yet that rank 0 has just written."""
    config = small(folder / "run")
    config = replace(config, stages=dict.fromkeys(("one", "two"), config.stages["projector"]))
    run_pipeline(config, world, until="one")
    questions, counting = easyvqa.read(folder), Counting()
    answer_all(questions[:4], Counting(), LIMIT, folder / "out", world, batch_size=1)
    if world.rank == 1:
        pipeline.is_stage_done = lambda stage_dir: False
        vqa_runner.read_predictions = lambda folder: {}
    if world.is_main:
        probe_runner.read_results = lambda *what: {"linear": {"mean": 1.0}}
    began = time.monotonic()
    run_pipeline(config, world)  # the second stage
    run_pipeline(config, world)  # nothing
    assert time.monotonic() - began < 30
    answer_all(questions, counting, LIMIT, folder / "out", world, batch_size=1)
    any_of: Any = None
    return counting.asked, results_for_all(folder / "none.json", any_of, any_of, any_of, world)


def test_all_go_by_what_the_main_rank_sees(tmp_path: Path) -> None:
    questions = ask(tmp_path)
    (asked, found), (others, found_too) = ranks.run(stale, 2, tmp_path, timeout=120)
    assert sorted([*asked, *others], key=int) == [one.id for one in questions[4:]]
    assert len(asked) - len(others) in (0, 1)
    assert found == found_too == {"linear": {"mean": 1.0}}
