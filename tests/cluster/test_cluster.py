"""Chains of two-node jobs on a real Slurm, disturbed in every way that a cluster disturbs them: they end where a
single undisturbed process ends, and what cannot go on is cancelled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tars
import tiny
import torch

from hive_scale import config as configs
from hive_scale import presets
from hive_scale.checkpoint.handoff import read_weights
from hive_scale.config import Config, PartConfig
from hive_scale.distributed import session
from hive_scale.train import run_pipeline
from hive_scale.watch.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"projector": 24, "language": 24, "joint": 60}  # optimizer steps
PACE = 0.25  # seconds of waiting added to each step, so that there is something to disturb
SLOW = f"""
import json, time
dumps = json.dumps
def slow(what, *args, **kwargs):
    if isinstance(what, dict) and "grad_norm" in what:  # a line of metrics.jsonl
        time.sleep({PACE})
    return dumps(what, *args, **kwargs)
json.dumps = slow
"""


def recipe(output: Path, pairs: Path) -> Config:
    """The debug recipe with a tiny model on a few small pairs."""
    train, heldout = (str(pairs / kind / "*.tar") for kind in ("train", "heldout"))
    run = presets.load("debug", None, [f"output={output}", "name=hive", "evidence=false", "eval_interval=0"])
    llm = tiny.language(vocab_size=259, hidden_size=32)
    model = replace(run.model, vision=PartConfig(config=tiny.SIGLIP), language=PartConfig(config=llm))
    stages = {
        name: replace(run.stages[name], steps=steps, global_batch=8, micro_batch=4) for name, steps in STAGES.items()
    }
    return replace(
        run, model=model, stages=stages, save_interval=5, data=replace(run.data, train=[train], heldout=[heldout])
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tars.write_set(folder / "train", [40, 40])
    tars.write_set(folder / "heldout", [8])
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Config:
    """The same recipe, trained by one process and never disturbed."""
    config = recipe(tmp_path_factory.mktemp("reference"), pairs)
    with session() as world:
        run_pipeline(config, world)
    return config


class Chain:
    """A run on the cluster, as a user has it: by the command."""

    def __init__(self, folder: Path, pairs: Path, *words: str) -> None:
        self.config = recipe(folder / "run", pairs)
        self.run = self.config.run_dir
        file = folder / "recipe.yaml"
        configs.save(self.config, file)
        self.begin = ["--config", str(file), *words]
        self.begin += ["slurm.nodes=2", "slurm.gpus_per_node=1", "slurm.cpus_per_task=1", "slurm.mem=1G"]

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

    def until_step(self, stage: str, step: int, starts: int) -> int:
        """Wait until attempt number `starts` at `stage` has made `step`; the step it is at."""

        def reached() -> bool:
            return len(self.attempts(stage, "begin")) >= starts and self.step(stage) >= step

        self.until(reached, f"step {step} of {stage} in attempt {starts}")
        return self.step(stage)

    def until_done(self) -> None:
        def over() -> bool:
            states = [self.state(stage) for stage in STAGES]
            assert not {"FAILED", "CANCELLED", "TIMEOUT"} & set(states), states
            return all(state == "COMPLETED" for state in states)

        self.until(over, "the end")

    def until(self, happened: Callable[[], bool], what: str, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                logs = "\n".join(path.read_text()[-3000:] for path in sorted(self.run.glob("slurm/logs/*.out")))
                pytest.fail(f"waited in vain for {what}\n{call('squeue', '-t', 'all')}\n{logs}")
            time.sleep(0.2)


def call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def pipeline(*words: str) -> str:
    """What submit_pipeline.py prints."""
    done = subprocess.run(
        [sys.executable, "slurm/submit_pipeline.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def paced(tmp_path: Path) -> str:
    (tmp_path / "pace").mkdir()
    (tmp_path / "pace" / "sitecustomize.py").write_text(SLOW)
    return f"slurm.setup=['export PYTHONPATH=$PYTHONPATH:{tmp_path / 'pace'}']"


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


def test_a_night_of_a_cluster(slurm: Path, tmp_path: Path, pairs: Path, paced: str, reference: Config) -> None:
    """FSDP2 over two nodes: a node fails in stage one, stage two is preempted, time cuts stage three into pieces."""
    chain = Chain(tmp_path, pairs, paced, "slurm.stages.language.partition=scavenge", "slurm.grace=90", "slurm.hours=1")
    shown = chain.submit()
    assert all(re.search(rf"{stage}\W+submit\W+{chain.job(stage)}", shown) for stage in STAGES), shown
    jobs = [chain.job(stage) for stage in STAGES]

    chain.until_step("projector", 8, starts=1)
    shown = chain.submit()  # once more, while it runs
    assert [chain.job(stage) for stage in STAGES] == jobs
    assert shown.count("kept") == 3
    call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    time.sleep(1)
    call("scontrol", "update", "nodename=n2", "state=resume")

    chain.until_step("language", 3, starts=1)
    (second,) = chain.attempts("projector", "begin")[1:]
    assert second["at"] in ("projector:5", "projector:10", "projector:15")  # a node that dies saves nothing more
    high = call("sbatch", "--parsable", "-p", "gpu", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    chain.until(lambda: len(chain.attempts("language", "end")) == 1, "the preempted attempt's end")
    assert chain.state("joint") == "PENDING"
    at = chain.step("language")

    for cut in (1, 2):
        reached = chain.step("joint")
        chain.until_step("joint", reached + 3, starts=cut)
        call("scontrol", "update", f"jobid={chain.job('joint')}", "EndTime=now+60")
        chain.until(lambda: len(chain.attempts("joint", "end")) == cut, f"the end of slice {cut}")  # noqa: B023
    chain.until_done()

    (_, after) = chain.attempts("language", "begin")
    assert after["at"] == f"language:{at}"  # nothing was lost
    assert call("sacct", "-X", "-n", "-o", "State", "-j", high.strip()).strip() == "COMPLETED"
    begins, ends = chain.attempts("joint", "begin"), chain.attempts("joint", "end")
    assert [line["code"] for line in ends] == [75] * (len(ends) - 1) + [0]
    assert len(begins) >= 3
    places = [int(line["at"].split(":")[1]) for line in begins]
    assert places[0] == 0
    assert sorted(set(places)) == places  # each slice began where the one before had stopped, and went on
    assert [chain.job(stage) for stage in STAGES] == jobs  # under the same ids
    same_end(chain.config, reference)


def test_zero_two_and_a_job_that_slurm_runs_again(slurm: Path, tmp_path: Path, pairs: Path, reference: Config) -> None:
    chain = Chain(tmp_path, pairs, "--ds_config", "ds_configs/zero2.json")
    chain.submit()
    weights = chain.run / "projector" / "weights.safetensors"
    chain.until(lambda: chain.state("projector") == "COMPLETED", "the end of stage one")
    made = weights.stat().st_mtime_ns
    call("scontrol", "requeue", chain.job("projector"))  # while the next stage is at work in the same directory
    chain.until(lambda: len(chain.attempts("projector", "end")) == 2, "the end of the second time")
    chain.until_done()
    assert weights.stat().st_mtime_ns == made
    same_end(chain.config, reference)
    shown = chain.submit("--ds_config", "ds_configs/zero2.json")
    assert shown.count("done") == 3
    assert "submit" not in shown.split("watch")[0]
    status = pipeline("status", str(chain.run))
    assert all(re.search(rf"{stage}\W+done\W+{steps}/{steps}", status) for stage, steps in STAGES.items()), status


def test_a_failed_stage_cancels_the_rest_and_is_resumed_and_cancelled(
    slurm: Path, tmp_path: Path, pairs: Path, paced: str
) -> None:
    chain = Chain(tmp_path, pairs, paced, "slurm.stages.projector.python=/bin/false")
    chain.submit()
    chain.until(lambda: chain.state("joint") == "CANCELLED", "the end of the chain")
    assert [chain.state(stage) for stage in STAGES] == ["FAILED", "CANCELLED", "CANCELLED"]
    before = [chain.job(stage) for stage in STAGES]

    shown = pipeline("resume", str(chain.run), f"slurm.stages.projector.python={sys.executable}")
    assert shown.count("submit") >= 3
    assert not {chain.job(stage) for stage in STAGES} & set(before)
    chain.until_step("projector", 3, starts=1)
    pipeline("cancel", str(chain.run))
    chain.until(lambda: chain.state("projector") == "CANCELLED", "the end of the cancelled job")
    chain.until(lambda: len(chain.attempts("projector", "end")) == 1, "its last words")
    at = chain.step("projector")
    assert (chain.run / "projector" / f"step_{at:08d}" / "manifest.json").exists()  # it saved
    time.sleep(2)
    assert {chain.state(stage) for stage in STAGES} == {"CANCELLED"}  # and stays down
    assert "stopped after step" in pipeline("logs", str(chain.run))


def test_a_chain_without_progress_ends(slurm: Path, tmp_path: Path, pairs: Path) -> None:
    """A job that is put back again and again before its first step gives up."""
    chain = Chain(tmp_path, pairs, "slurm.attempts=1")
    chain.submit()
    chain.until(lambda: len(chain.attempts("projector", "begin")) == 1, "the first attempt")
    call("scontrol", "requeue", chain.job("projector"))
    chain.until(lambda: chain.state("projector") == "FAILED", "the end")
    assert "1 attempts in a row began at projector:0" in pipeline("logs", str(chain.run), "projector")
