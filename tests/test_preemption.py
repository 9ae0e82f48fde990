"""A run that is asked to stop, on any rank and in any way, saves its last step and reports how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import torch

from hive_scale import presets
from hive_scale.callbacks import Callback
from hive_scale.distributed import World
from hive_scale.engine import StepOutput
from hive_scale.exit_codes import Stopped
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline
from hive_scale.resilience import preemption as interrupts
from hive_scale.resilience.preemption import SIGNALS, STOP, listening
from hive_scale.train import StageRun

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))


def test_every_signal_asks_and_the_launchers_echo_of_it_is_not_a_second_one(tmp_path: Path) -> None:
    for number in SIGNALS:
        with listening(tmp_path, ALONE) as interrupt:
            assert not interrupt.requested()
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert interrupt.requested()


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "ECHO", 0.0)
    child = os.fork()
    if child == 0:
        with listening(tmp_path, ALONE):
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_stop_file_asks_whenever_it_was_made_until_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "LOOK", 0.0)
    for _ in range(2):
        with listening(tmp_path, ALONE) as interrupt:
            assert interrupt.requested() == (tmp_path / STOP).exists()
            (tmp_path / STOP).touch()
            assert interrupt.requested()
    (tmp_path / STOP).unlink()
    with listening(tmp_path, ALONE) as interrupt:
        assert not interrupt.requested()


def stopped_by_one_rank(world: World, output: str, ask: str) -> str:
    """What ends a run of which rank 1 is signalled, or the directory given a STOP file, after step 2."""

    class Ask(Callback):
        def on_step(self, stage: StageRun, _: StepOutput) -> None:
            if stage.at.step == 2 and world.rank == 1:
                if ask == STOP:
                    Path(output, STOP).touch()
                else:
                    signal.raise_signal(signal.Signals[ask])

    interrupts.LOOK = 0.0
    words = [f"output={output}", "stages.projector.max_steps=5", "stages.projector.global_batch=8"]
    try:
        run_pipeline(presets.load("debug", None, words), world, callbacks=[Ask()])
    except Stopped as stopped:
        return str(stopped)
    return "not stopped"


@pytest.mark.parametrize("ask", ["SIGUSR1", STOP])
def test_one_rank_is_asked_and_all_stop_at_the_same_step(tmp_path: Path, ask: str) -> None:
    said = ranks.run(stopped_by_one_rank, 2, str(tmp_path / "run"), ask)
    assert said[0] == said[1]
    steps = len(read_metrics(tmp_path / "run" / "projector" / "metrics.jsonl"))
    assert said[0] == f"projector stopped after step {steps} of 5, and saved it"
    assert steps in (3, 4)  # by then rank 0 has seen the file
    assert (tmp_path / "run" / "projector" / f"step_{steps:08d}" / "manifest.json").exists()


LAUNCHERS = {
    "torchrun": "torchrun --nproc_per_node 2 launchers/pretrain.py",
    "deepspeed": "deepspeed --num_gpus 2 launchers/pretrain.py --ds_config ds_configs/zero2.json",
}


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_the_launcher_loses_no_step(
    tmp_path: Path, launcher: str, started: list[subprocess.Popen[str]]
) -> None:
    words = [f"output={tmp_path / 'run'}", "stages.projector.max_steps=4000", "stages.projector.global_batch=8"]
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [*ranks.at_free_port(LAUNCHERS[launcher].split()), *words],
        cwd=ROOT,
        env=os.environ | {"PATH": beside, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    metrics = tmp_path / "run" / "projector" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while len(read_metrics(metrics)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0]
    if launcher == "deepspeed":  # its outer process leaves one node's signals to the inner one
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
    else:
        process.terminate()
    shown, _ = process.communicate(timeout=120)
    steps = len(read_metrics(metrics))
    assert (metrics.parent / f"step_{steps:08d}" / "manifest.json").exists(), shown
    assert f"projector stopped after step {steps} of 4000, and saved it" in shown
