"""A cluster ends with the tests that started it, its jobs included, however these end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
from chains import why_not
from test_guardian import bearing, running, until_none_runs

DAEMONS = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "slurmstepd", "sleep"}


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_no_daemon_outlives_the_tests(tmp_path: Path, number: signal.Signals) -> None:
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Slurm here: {reason}")
    base = Path(mkdtemp(dir="/tmp"))  # short: Slurm's sockets lie below it, and their paths have at most 108 bytes
    name, is_up = f"STARTED_HERE={os.getpid()}-{number}", tmp_path / "up"
    env = os.environ | {"IS_UP": str(is_up)} | dict([name.split("=")])
    test = ["-m", "pytest", "-q", f"--basetemp={base / 'b'}", "tests/cluster/interrupted.py"]
    # where these tests run in a shell's background, they are deaf to SIGINT, and hand that on
    line = ["env", "--default-signal=INT", sys.executable, *test]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(line, cwd=root, env=env, start_new_session=True, stdout=subprocess.PIPE, text=True) as child:
        started: set[int] = set()
        deadline = time.monotonic() + 240
        while child.poll() is None and not (is_up.exists() and names(started) >= DAEMONS):
            if time.monotonic() > deadline:
                child.kill()
                pytest.fail(f"of the cluster only {names(started)} run after four minutes")
            time.sleep(0.2)
            started = bearing(name)
        assert child.poll() is None, child.stdout.read() if child.stdout else ""
        if number == signal.SIGINT:
            os.killpg(child.pid, number)  # as a terminal sends it: to all that are in the foreground
        else:
            child.send_signal(number)
        child.wait(timeout=60)
        assert not until_none_runs(started, 60), names(running(started))
        assert not bearing(name) - {os.getpid()}
    rmtree(base, ignore_errors=True)


def names(pids: set[int]) -> set[str]:
    """What the processes are called."""
    found = set()
    for pid in pids:
        try:
            found.add((Path("/proc") / str(pid) / "comm").read_text().strip())
        except OSError:
            continue
    return found
