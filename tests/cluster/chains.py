"""A run on a cluster as a user has it, by the command; and the same recipe to compare it with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hive_scale import config as configs
from hive_scale import presets
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import Config, PartConfig
from hive_scale.observability.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"projector": 24, "language": 24, "joint": 60}  # optimizer steps
SAVING = "saving after this step"  # what a process says to the first signal
# Steps wait from the number on that a file says: what disturbs them meets them there, however slow the machine is. A
# file `raise` beside it is a device that is lost
HOLD = """
import json, os, time
from pathlib import Path
def raised():
    if (file := hold.with_name("raise")).exists():
        import torch
        file.unlink()
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
dumps, hold = json.dumps, Path(os.environ["HOLD"])
def limit():
    try:
        return int(hold.read_text())
    except OSError:
        return 10**9
def held(what, *args, **kwargs):
    if isinstance(what, dict) and "grad_norm" in what:  # a line of metrics.jsonl
        while what["step"] >= limit():
            raised()
            time.sleep(0.05)
    return dumps(what, *args, **kwargs)
json.dumps = held
"""


def recipe(output: Path, pairs: Path) -> Config:
    """The debug recipe with a tiny model on a few small pairs."""
    train, heldout = (str(pairs / kind / "*.tar") for kind in ("train", "heldout"))
    run = presets.load(
        "debug", None, [f"output={output}", "name=hive|a b", "blank_image_control=false", "eval_interval=0"]
    )
    llm = tiny.language(vocab_size=259, hidden_size=32)
    model = replace(run.model, vision=PartConfig(config=tiny.SIGLIP), language=PartConfig(config=llm))
    stages = {
        name: replace(run.stages[name], max_steps=steps, global_batch=8, micro_batch=4)
        for name, steps in STAGES.items()
    }
    return replace(
        run, model=model, stages=stages, save_interval=5, data=replace(run.data, train=[train], heldout=[heldout])
    )


class Chain:
    """A run on the cluster, as a user has it: by the command."""

    def __init__(self, folder: Path, pairs: Path, *words: str) -> None:
        self.config = recipe(folder / "run", pairs)
        self.run = self.config.run_dir
        file = folder / "recipe.yaml"
        configs.save(self.config, file)
        self.begin = ["--config", str(file), *words]
        (folder / "hold").mkdir()
        (folder / "hold" / "sitecustomize.py").write_text(HOLD)
        self.folder = folder
        self.begin += [self.held(stage) for stage in STAGES]
        self.begin += ["slurm.nodes=2", "slurm.gpus_per_node=1", "slurm.cpus_per_task=1", "slurm.mem=1G"]

    def held(self, stage: str) -> str:
        """A word that lets the steps of a job be held."""
        exports = f"export PYTHONPATH=$PYTHONPATH:{self.folder / 'hold'} HOLD={self.hold_file(stage)}"
        return f"slurm.stages.{stage}.setup=['{exports}']"

    def hold_file(self, stage: str) -> Path:
        return self.folder / "hold" / stage

    def hold(self, stage: str, step: int) -> None:
        """From now on `stage` waits after `step` until the hold is moved on or let go."""
        unnamed = self.hold_file(f"{stage}.tmp")
        unnamed.write_text(str(step))
        unnamed.rename(self.hold_file(stage))

    def let_go(self, stage: str) -> None:
        self.hold_file(stage).unlink()

    def task(self, stage: str, rank: int) -> int | None:
        """Process id of a task of the stage's job, once it has met the others: it has a companion then."""
        own = {f"SLURM_JOB_ID={self.job(stage)}", "SLURM_STEP_ID=0", f"SLURM_PROCID={rank}"}
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if own <= {*(process / "environ").read_text(errors="replace").split("\0")}:
                    found[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        return next((parent for parent in found.values() if parent in found and found[parent] not in found), None)

    def told(self, stage: str, what: str) -> int:
        """How often the first process of the stage's job has said `what`."""
        log = self.run / "slurm" / "logs" / f"{self.job(stage)}_0_log.out"
        return log.read_text().count(what) if log.exists() else 0

    def submit(self, *words: str) -> str:
        return pipeline(*self.begin, *words)

    def job(self, stage: str) -> str:
        return str(json.loads((self.run / "slurm" / "chain.json").read_text())["jobs"][stage])

    def lines(self, stage: str) -> list[dict[str, Any]]:
        return read_metrics(self.run / stage / "metrics.jsonl")

    def step(self, stage: str) -> int:
        lines = self.lines(stage)
        return int(lines[-1]["step"]) if lines else 0

    def attempts(self, stage: str, event: str) -> list[dict[str, Any]]:
        path = self.run / "slurm" / "attempts.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["stage"] == stage and line["event"] == event]

    def state(self, stage: str) -> str:
        return call("squeue", "-h", "-t", "all", "-j", self.job(stage), "-o", "%T").strip()

    def until_step(self, stage: str, step: int) -> None:
        """Wait until a job is at `step` of `stage`: it made the one before, and is held in this one."""
        self.until(lambda: self.step(stage) >= step - 1, f"step {step} of {stage}")

    def until_done(self, jobs: Iterable[str] = STAGES) -> None:
        def over() -> bool:
            states = [self.state(job) for job in jobs]
            assert not {"FAILED", "CANCELLED", "TIMEOUT"} & set(states), states
            return all(state == "COMPLETED" for state in states)

        self.until(over, "the end")

    def until(self, happened: Callable[[], bool], what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                logs = "\n".join(path.read_text()[-3000:] for path in sorted(self.run.glob("slurm/logs/*.out")))
                pytest.fail(f"waited in vain for {what}\n{call('squeue', '-t', 'all')}\n{logs}")
            time.sleep(0.2)


def why_not() -> str:
    if os.geteuid() != 0:
        return "only root may start its daemons"
    if not shutil.which("apt-get"):
        return "its packages are Debian's"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False).returncode:
        return "this container may not unshare host names (it needs CAP_SYS_ADMIN)"
    return ""


def call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def pipeline(*words: str, code: int = 0) -> str:
    """What submit_pipeline.py prints."""
    done = subprocess.run(
        [sys.executable, "slurm/submit_pipeline.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def same_end(ours: Config, theirs: Config, stages: Sequence[str] = tuple(STAGES)) -> None:
    """The same losses, step by step, and the same weights up to what float32 loses in another order of adding."""
    for stage in stages:
        one, other = (read_metrics(config.run_dir / stage / "metrics.jsonl") for config in (ours, theirs))
        assert [line["step"] for line in one] == list(range(1, STAGES[stage] + 1)), stage
        torch.testing.assert_close(
            torch.tensor([line["loss"] for line in one]),
            torch.tensor([line["loss"] for line in other]),
            rtol=1e-3,
            atol=0.0,
        )
    weights, expected = (read_weights(config.run_dir / stages[-1] / "weights.safetensors") for config in (ours, theirs))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-2, atol=1e-3, msg=name)
