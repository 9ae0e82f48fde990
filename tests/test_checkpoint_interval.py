"""Checkpoints come as often as failures demand, and in time before an allocation ends; a warning says early if a stop
would take too long.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise
from math import inf

import pytest

from hive_scale.resilience.checkpoint_interval import DAY, FIRST, CheckpointInterval, best_interval, seconds_left


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lost_share(interval: float, save: float, expected_failures_per_day: float) -> float:
    """Share of a year that is not spent on work that counts, by simulation: saves, and work since the last of them."""
    draw, length, useful = random.Random(1), 300 * DAY, 0.0
    at = 0.0
    while at < length:
        until = draw.expovariate(expected_failures_per_day / DAY)
        useful += until // (interval + save) * interval
        at += until
    return 1 - useful / at


@pytest.mark.parametrize(("save", "failures"), [(5.0, 2.0), (60.0, 24.0)])
def test_the_interval_is_the_best_one(save: float, failures: float) -> None:
    best = best_interval(save, failures)
    assert lost_share(best, save, failures) < lost_share(best / 3, save, failures)
    assert lost_share(best, save, failures) < lost_share(best * 3, save, failures)


def test_no_failures_need_no_saves() -> None:
    assert best_interval(5.0, 0.0) == inf


def test_saves_come_by_what_the_first_one_cost() -> None:
    clock = Clock()
    cadence = CheckpointInterval(0, expected_failures_per_day=24, grace=30, left=inf, clock=clock)
    due = []
    for step in range(1, 2000):
        clock.now += 1
        cadence.stepped(2.0 if due else 0.0)
        if cadence.due(step):
            cadence.saved(blocked=0.5)
            due.append(step)
    assert due[0] == FIRST
    interval = best_interval(0.5, 24)
    assert all(interval <= later - earlier <= interval + 1 for earlier, later in pairwise(due))


def test_a_set_interval_is_kept() -> None:
    cadence = CheckpointInterval(7, expected_failures_per_day=24, grace=30, left=inf)
    assert [step for step in range(1, 22) if cadence.due(step)] == [7, 14, 21]


def test_the_last_save_is_done_before_the_allocation_ends() -> None:
    clock = Clock()
    cadence = CheckpointInterval(0, expected_failures_per_day=2, grace=30, left=600.0, clock=clock)
    steps = 0
    while not cadence.time_is_up():
        clock.now += 12
        steps += 1
        cadence.stepped(20.0)
    assert 600 - 12 * steps >= 12 + 20  # one more step and its save
    assert steps > 30


def test_slurms_end_is_read_and_a_clock_that_jumps_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    assert 3590 < seconds_left({"SLURM_JOB_END_TIME": str(int(now) + 3600)}) <= 3600
    assert seconds_left({"SLURM_JOB_END_TIME": str(int(now) - 5)}) == inf
    assert seconds_left({}) == inf
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 3600))
    cadence = CheckpointInterval(0, expected_failures_per_day=2, grace=30)
    monkeypatch.setattr(time, "time", lambda: now + DAY)
    assert not cadence.time_is_up()


def test_a_grace_period_that_is_too_short_is_told_once() -> None:
    cadence = CheckpointInterval(10, expected_failures_per_day=2, grace=30, left=inf, clock=(clock := Clock()))
    said = []
    for _ in range(20):
        clock.now += 8
        cadence.stepped(15.0)
        said.append(cadence.warning())
    (told,) = filter(None, said)
    assert "evaluation included, 8.0, a save 15.0), more than grace_seconds=30" in told
