"""Why: tests start daemons, browsers and launchers; none may be left running, however the tests end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# a fork, a child that ignores SIGTERM in a session of its own, and a daemon that init has adopted
STARTS = """
import multiprocessing, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import guardian
guardian.watch()
DAEMON = "import os, sys; os.fork() and sys.exit(); os.setsid(); os.execvp('sleep', ['sleep', '600'])"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
fork.start()
deaf = subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True)
subprocess.run([sys.executable, "-c", DAEMON])
time.sleep(1.5)  # forks are looked for every second
print("up", fork.pid, deaf.pid, flush=True)
{end}
"""


def running(pids: Iterable[int]) -> set[int]:
    """Those that are, and are no zombies."""

    def is_alive(pid: int) -> bool:
        try:
            return (Path("/proc") / str(pid) / "cmdline").read_bytes() != b""
        except OSError:
            return False

    return {pid for pid in pids if is_alive(pid)}


def bearing(text: str) -> set[int]:
    """Processes that began with `text` in their environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
        except OSError:
            continue
    return found


def until_none_runs(pids: Iterable[int], seconds: float) -> set[int]:
    """Those of `pids` that run still after so long."""
    end = time.monotonic() + seconds
    while (left := running(pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


@pytest.mark.parametrize("end", ["time.sleep(600)", "deaf.kill(); raise SystemExit(1)"])
def test_what_a_process_has_started_ends_with_it(end: str) -> None:
    name = f"STARTED_HERE={os.getpid()}-{time.monotonic_ns()}"
    env = os.environ | dict([name.split("=")])
    line = [sys.executable, "-c", STARTS.format(end=end), str(TESTS)]
    with subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        started = bearing(name) | {int(pid) for pid in said[1:]}
        if "600" in end:
            assert len(running(started)) >= 5, said  # the two, the daemon, the guardian, and itself
            process.kill()
        process.wait(timeout=60)
        assert not until_none_runs(started, 40)


def test_a_process_that_ends_well_is_not_kept_waiting() -> None:
    script = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import guardian; guardian.watch()"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 10
    assert not done.stderr


def test_these_tests_are_watched() -> None:
    mine = os.environ["HIVE_SCALE_STARTED_BY"]
    guardians = [
        pid
        for pid in running(bearing(f"HIVE_SCALE_STARTED_BY={mine}"))
        if str(os.getpid()).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    assert len(guardians) == 1
    assert os.getsid(guardians[0]) != os.getsid(0)  # out of the reach of Ctrl-C
    signal.pidfd_send_signal(os.pidfd_open(guardians[0]), 0)
