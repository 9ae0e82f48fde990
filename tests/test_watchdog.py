"""A rank that hangs or vanishes is named, with what it was doing, and the job ends so that it can be tried again."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hive_scale import presets
from hive_scale.callbacks import Callback
from hive_scale.distributed import World, session
from hive_scale.engine import StepOutput
from hive_scale.exit_codes import TRY_AGAIN
from hive_scale.pipeline import run_pipeline
from hive_scale.resilience.watchdog import Watchdog
from hive_scale.train import StageRun

FAULTS = ("sleeps in its forward", "is killed in its forward", "waits for its data", "is killed, and is rank 0")


def unlucky(rank: int, port: int, folder: Path, fault: str) -> None:
    """A rank of a run in which one, in step 3, meets `fault`; what it says goes to a file."""
    output = os.open(folder / f"said_{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    callbacks = [InStep3(fault)] if rank == (0 if "rank 0" in fault else 1) else []
    words = [f"output={folder / 'run'}", "watchdog_seconds=10", "stages.projector.global_batch=8", "data.workers=0"]
    with session() as world:
        run_pipeline(presets.load("debug", None, words), world, callbacks=callbacks)


class InStep3(Callback):
    """Brings about `fault` once two steps are done."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def on_step(self, stage: StageRun, output: StepOutput) -> None:
        if stage.at.step < 2:
            return

        def act(*_: Any) -> Any:
            if "killed" in self.fault:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)

        if "data" in self.fault:
            stage.train.read = act  # type: ignore[method-assign]
        else:
            stage.engine.loss = act


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stands_still_is_named_and_the_job_ends(tmp_path: Path, fault: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [ranks.CONTEXT.Process(target=unlucky, args=(rank, port, tmp_path, fault)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [(tmp_path / f"said_{rank}").read_text() for rank in range(2)]
    killed = "killed" in fault
    victim = 0 if "rank 0" in fault else 1
    assert codes[victim] == (-signal.SIGKILL if killed else TRY_AGAIN), said
    assert codes[1 - victim] == TRY_AGAIN, said
    if killed:
        assert ("rank 0, which holds" if victim == 0 else "has gone without a word") in said[1 - victim]
        return
    both = "\n".join(said)
    phase = "data" if "data" in fault else "forward"
    assert f"rank 1: step 3, {phase} for " in both
    assert "none missing" in both
    assert "time.sleep(1000)" in said[1]  # its stack
    assert "samples " in said[0]


def stopped(seconds: float, ready: Any) -> None:
    """A process whose step takes so long after it was stopped."""
    world = World(0, 1, torch.device("cpu"))
    with Watchdog(world, deadline=8):
        world.timer.enter("forward")
        ready.set()
        time.sleep(1)  # in which it is stopped
        time.sleep(seconds)
    os._exit(0)


@pytest.mark.parametrize(("seconds", "code"), [pytest.param(1, 0, marks=pytest.mark.slow), (20, TRY_AGAIN)])
def test_a_suspended_job_goes_on_and_is_watched_as_before(seconds: float, code: int) -> None:
    ready = ranks.CONTEXT.Event()
    process = ranks.CONTEXT.Process(target=stopped, args=(seconds, ready))
    process.start()
    try:
        assert ready.wait(60)
        pid = process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        time.sleep(10)
        os.kill(pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == code
    finally:
        process.kill()
