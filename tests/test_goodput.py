"""Every second of a stage is in exactly one account, also over restarts and after discarded work."""

from __future__ import annotations

import time

import pytest

from hive_scale.observability.goodput import Goodput, added, summary
from hive_scale.phase_timer import PhaseTimer


def attempt(lines: list[dict[str, object]], done: int, steps: range) -> list[dict[str, object]]:
    """Lines of a process that goes on after step `done`; each step takes 10 ms of data and 20 ms of work."""
    timer = PhaseTimer()
    goodput = Goodput(timer, lines, done)
    time.sleep(0.05)
    kept = [line for line in lines if int(str(line["step"])) <= done]
    for step in steps:
        timer.enter("data")
        time.sleep(0.01)
        timer.enter("forward")
        time.sleep(0.02)
        kept.append({"step": step, "time": time.time(), **goodput.line()})
    return kept


def test_every_second_is_in_one_account() -> None:
    began = time.time()
    first = attempt([], 0, range(1, 11))
    time.sleep(0.3)  # nobody is there
    second = attempt(first, 6, range(7, 13))
    spent = second[-1]["spent"]
    assert isinstance(spent, dict)
    assert sum(spent.values()) == pytest.approx(time.time() - began, abs=0.1)
    assert second[-1]["lost_steps"] == 4
    least = {"lost": 4 * 0.02, "steps": 12 * 0.02, "data": 16 * 0.01, "start": 0.1, "down": 0.3}
    assert all(spent[account] > 0.99 * seconds for account, seconds in least.items()), spent
    total, lost = added([first[-1], second[-1]])  # type: ignore[list-item]
    assert lost == 4
    assert "4 steps lost" in summary(total, lost)


def test_a_clock_set_back_makes_no_negative_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = attempt([], 0, range(1, 3))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    assert Goodput(PhaseTimer(), lines, 2).spent()["down"] == 0.0
