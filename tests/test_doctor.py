"""The doctor calls a healthy cluster healthy, and names each fault with its remedy; two processes serve as cluster.

Why: a user runs it once before weeks of GPU time. A fault that it overlooks costs these weeks, a false alarm a day.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_placement import MINE, ROOT, Net, net, srun, start  # noqa: F401

from hive_scale.commands import doctor
from hive_scale.distributed import World

CHECKS = (
    "devices",
    "software",
    "ranks",
    "interfaces",
    "ports",
    "clocks",
    "locks",
    "coherence",
    "renames",
    "all-reduce",
)
DOCTOR = "import sys; from hive_scale.commands.doctor import main; sys.exit(main(sys.argv[1:]))"
# a clock that is ahead, and another Python
AHEAD = "import time, platform; now = time.time; time.time = lambda: now() + 40"
ILL = f"{AHEAD}; platform.python_version = lambda: '2.7'; {DOCTOR}"


def pair(*scripts: str, words: tuple[str, ...], prefix: Any = ((), ())) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of two processes that meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {name: value for name, value in os.environ.items() if name not in MINE}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    env["OMP_NUM_THREADS"] = "1"
    started = [
        start(script, *words, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, prefix=prefix[rank])
        for rank, script in enumerate(scripts)
    ]
    said = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def verdicts(shown: str) -> dict[str, set[str]]:
    """By check."""
    found: dict[str, set[str]] = {}
    for line in shown.splitlines():
        if line.startswith(doctor.VERDICTS):
            verdict, check = line.split()[:2]
            found.setdefault(check, set()).add(verdict)
    return found


def test_two_processes_of_a_healthy_machine(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    (code, shown, errors), (other, silent, _) = pair(DOCTOR, DOCTOR, words=("--dir", str(folder), "--seconds", "0.2"))
    assert (code, other) == (0, 0), shown + errors
    assert verdicts(shown) == {check: {"ok"} for check in CHECKS}
    assert socket.gethostname() in shown.splitlines()[0]
    assert "GB/s on the bus" in shown
    assert silent == "", "rank 0 speaks for all"
    assert not list(folder.iterdir()), "nothing is left behind"


def test_illnesses_are_named_with_their_remedies(tmp_path: Path) -> None:
    """The second process has a clock, a Python and a disk of its own."""
    if os.geteuid():
        pytest.skip("needs root, to mount")
    (tmp_path / "shared").mkdir()
    shell = f'mount -t tmpfs tmpfs {tmp_path}/shared && exec "$@"'
    prefix = (), ("unshare", "--mount", "sh", "-c", shell, "sh")
    words = ("--dir", f"{tmp_path}/shared", "--seconds", "0")
    (code, shown, errors), (other, _, _) = pair(DOCTOR, ILL, words=words, prefix=prefix)
    assert (code, other) == (2, 2), shown + errors
    found = verdicts(shown)
    assert found.pop("clocks") == {"ok", "WARN"}
    assert "(rank 1): 40.0 s ahead" in shown
    assert "chronyc tracking" in shown
    assert found.pop("software") == {"FAIL"}
    assert "Python 2.7" in shown
    assert found.pop("folder") == {"FAIL"}
    assert "(rank 1): " in shown.partition("folder")[2]
    assert "a file system that all nodes share" in shown
    assert set.union(*found.values()) == {"ok"}


@pytest.mark.usefixtures("net")
def test_ports_that_are_shut_are_told_before_anything_waits_for_them(net: Net) -> None:  # noqa: F811
    for name in net.names:
        subprocess.run(
            f"ip -n {name} rule add ipproto tcp sport 32768-60999 dport 32768-60999 prohibit".split(), check=True
        )
    job = str(os.getpid())
    started = [
        start(DOCTOR, env=srun(rank, 2, "node[1-2]", job), prefix=prefix) for rank, prefix in enumerate(net.commands)
    ]
    said = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert verdicts(said[0][0])["ports"] == {"FAIL"}
    assert "node1 (rank 0): cannot reach rank 1 at 10.77.0.2:" in said[0][0]
    assert "open TCP ports 32768 to 60999" in said[0][0]
    assert "wire1 to the others" in said[0][0]


def test_one_process_needs_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert set(verdicts(shown)) == set(CHECKS) - {"ports", "clocks"}
    (tmp_path / "file").touch()
    assert doctor.main(["--dir", str(tmp_path / "file")]) == 2
    assert "FAIL folder" in capsys.readouterr().out
    for seconds in ("nan", "inf", "-1"):
        assert doctor.main(["--seconds", seconds]) == 2
    assert "--seconds -1.0 is no length of time" in capsys.readouterr().err


def test_an_interface_that_is_not_there_is_told_before_gloo_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    [line] = doctor._interfaces(World(0, 2, torch.device("cpu")))
    assert line.verdict == "FAIL"
    assert line.told.startswith("nosuch0, which is named, is not there or has no address")
    assert "slurm.interface" in line.remedy


@pytest.mark.parametrize(("free", "verdict"), [(79e9, "ok"), (40e9, "WARN")])
def test_memory_that_another_has_is_told(monkeypatch: pytest.MonkeyPatch, free: float, verdict: str) -> None:
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (int(free), int(80e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    [line] = doctor._devices(World(0, 1, torch.device("cuda", 0)))
    assert line[:3] == ("devices", verdict, f"H100, {free / 1e9:.1f} of 80.0 GB free")


def test_the_speed_of_a_bus_is_what_each_rank_sends() -> None:
    speed, told = doctor._speed(4, 64 * doctor.MB, [0.5, 0.1, 0.1])
    assert speed == pytest.approx(1.5 * 64 * doctor.MB / 0.1)
    assert told == "1.01 GB/s on the bus with 64 MiB, 3 times; the slowest took 5.0 times as long as most"


@pytest.mark.parametrize(
    ("speed", "failed", "accelerated", "verdict"),
    [(2e9, False, True, "ok"), (1e8, False, True, "WARN"), (1e8, False, False, "ok"), (2e9, True, True, "FAIL")],
)
def test_a_slow_or_wrong_all_reduce(speed: float, failed: bool, accelerated: bool, verdict: str) -> None:
    line = doctor._judged("so fast", speed, failed, accelerated)
    assert line.verdict == verdict
    assert bool(line.remedy) == (verdict != "ok")
