"""torchrun's restarts work with our own resume: a dead rank, or node, costs only the steps since the last save."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hive_scale.observability.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STEPS = 60
WORDS = ["save_interval=5", "blank_image_control=false", "data.heldout=[sample:heldout]"]


@pytest.fixture
def launch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes = []

    def start(output: Path, *options: str) -> subprocess.Popen[str]:
        stages = [f"stages.{stage}.max_steps=2" for stage in ("language", "joint")]
        words = [*WORDS, *stages, f"stages.projector.max_steps={STEPS}", "stages.projector.global_batch=16"]
        process = subprocess.Popen(
            ["torchrun", *options, "launchers/pretrain.py", *words, f"output={output}"],
            cwd=ROOT,
            env=os.environ
            | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def workers(agent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def wait_for_steps(metrics: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while len(read_metrics(metrics)) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def test_a_dead_rank_is_replaced(tmp_path: Path, launch: Callable[..., subprocess.Popen[str]]) -> None:
    process = launch(tmp_path / "run", "--nproc_per_node", "2", "--max_restarts", "1")
    metrics = tmp_path / "run" / "projector" / "metrics.jsonl"
    wait_for_steps(metrics, 12, process)
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 0, shown
    lines = read_metrics(metrics)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["lost_steps"] <= 5 + 5  # since the last save, and one whose write was under way


@pytest.mark.slow  # minutes: torchrun takes its time to miss a node
def test_a_dead_node_is_done_without(tmp_path: Path, launch: Callable[..., subprocess.Popen[str]]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "3"]
    options += ["--rdzv_backend", "c10d", "--rdzv_endpoint", meeting, "--rdzv_id", "night", "--local_addr", "127.0.0.1"]
    first = launch(tmp_path / "run", *options, "--rdzv_conf", "is_host=1")  # the meeting place is not to die
    second = launch(tmp_path / "run", *options, "--rdzv_conf", "is_host=0")
    metrics = tmp_path / "run" / "projector" / "metrics.jsonl"
    wait_for_steps(metrics, 12, first)
    os.killpg(second.pid, signal.SIGKILL)
    for worker in workers(second.pid) if second.poll() is None else ():
        os.kill(worker, signal.SIGKILL)
    shown, _ = first.communicate(timeout=400)
    assert first.returncode == 0, shown
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, STEPS + 1))
