"""Chains of two-node jobs on a real Slurm: they end where a single process ends, and what cannot go on is cancelled."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from chains import ROOT, SAVING, STAGES, Chain, call, pipeline, same_end
from test_vlm import recipe as vlm_recipe
from test_vlm import write_questions

from hive_scale.config import Config


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


def test_a_failed_stage_cancels_the_rest_and_is_resumed_and_cancelled(slurm: Path, tmp_path: Path, pairs: Path) -> None:
    chain = Chain(tmp_path, pairs, "slurm.stages.projector.python=/bin/false")
    chain.hold("projector", 3)
    chain.submit()
    chain.until(lambda: chain.state("joint") == "CANCELLED", "the end of the chain")
    assert [chain.state(stage) for stage in STAGES] == ["FAILED", "CANCELLED", "CANCELLED"]
    before = [chain.job(stage) for stage in STAGES]

    shown = pipeline("resume", str(chain.run), f"slurm.stages.projector.python={sys.executable}")
    assert shown.count("submit") >= 3
    assert not {chain.job(stage) for stage in STAGES} & set(before)
    chain.until_step("projector", 3)
    pipeline("cancel", str(chain.run))
    chain.until(lambda: chain.told("projector", SAVING) > 0, "the signal")
    chain.let_go("projector")
    chain.until(lambda: chain.state("projector") == "CANCELLED", "the end of the cancelled job")
    chain.until(lambda: len(chain.attempts("projector", "end")) == 1, "its last words")
    at = chain.step("projector")
    assert (chain.run / "projector" / f"step_{at:08d}" / "manifest.json").exists()  # it saved
    time.sleep(2)
    assert {chain.state(stage) for stage in STAGES} == {"CANCELLED"}  # and stays down
    assert "stopped after step" in pipeline("logs", str(chain.run))


@pytest.mark.slow
def test_a_chain_without_progress_ends(slurm: Path, tmp_path: Path, pairs: Path) -> None:
    """A job that is killed again and again before it can save gives up."""
    chain = Chain(tmp_path, pairs, "slurm.attempts=1")
    chain.hold("projector", 1)
    chain.submit()
    chain.until((chain.run / "projector" / "metrics.jsonl").exists, "the first attempt")
    call("scontrol", "requeue", chain.job("projector"))
    chain.until(lambda: chain.state("projector") == "FAILED", "the end")
    assert "1 attempts in a row began at projector:0" in pipeline("logs", str(chain.run), "projector")


def test_a_lost_task_or_device_costs_an_attempt_and_not_the_chain(slurm: Path, tmp_path: Path, pairs: Path) -> None:
    """Of two tasks on a node one is killed, one aborts, one loses its device: each time there is a try elsewhere."""
    chain = Chain(tmp_path, pairs)
    chain.hold("projector", 3)
    chain.submit("slurm.nodes=1", "slurm.tasks_per_node=2", "slurm.gpus_per_node=0", "slurm.exclude_failed=true")
    for attempt, (rank, number) in enumerate(((1, signal.SIGKILL), (0, signal.SIGABRT), (0, None)), 1):
        chain.until(lambda: len(chain.attempts("projector", "begin")) == attempt, f"attempt {attempt}")  # noqa: B023
        if number is None:
            (chain.folder / "hold" / "raise").touch()
        else:
            chain.until(lambda: chain.task("projector", rank) is not None, "the task")  # noqa: B023
            task = chain.task("projector", rank)
            assert task is not None
            os.kill(task, number)
        chain.until(lambda: chain.state("projector") != "RUNNING", "the end of the attempt")
        assert chain.state("projector") != "FAILED"
        assert chain.state("language") == "PENDING"
    chain.until(lambda: len(chain.attempts("projector", "begin")) == 4, "the last attempt")
    shown = pipeline("status", str(chain.run), code=1)
    chain.let_go("projector")
    chain.until(lambda: chain.state("projector") == "COMPLETED", "the end of the stage")
    pipeline("cancel", str(chain.run))
    places = [line["nodes"] for line in chain.attempts("projector", "begin")]
    assert all(one != other for one, other in pairwise(places)), places
    assert "projector lost a task or a device on n1, n2\n" in shown


def test_tasks_that_are_killed_before_they_begin_are_counted(slurm: Path, tmp_path: Path, pairs: Path) -> None:
    """By the job's script, since nobody else can."""
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    chain = Chain(tmp_path, pairs, f"slurm.stages.projector.python={killed}")
    chain.submit("slurm.attempts=2")
    chain.until(lambda: chain.state("joint") == "CANCELLED", "the end of the chain")
    assert chain.state("projector") == "FAILED"
    assert "Restarts=1 " in call("scontrol", "show", "job", chain.job("projector"))
    assert not chain.attempts("projector", "begin")


def test_a_night_of_a_cluster(slurm: Path, tmp_path: Path, pairs: Path, reference: Config) -> None:
    """FSDP2 over two nodes: a node fails in stage one, stage two is preempted, time cuts stage three into three."""
    chain = Chain(tmp_path, pairs, "slurm.stages.language.partition=scavenge", "slurm.grace=90", "slurm.hours=1")
    for stage, step in (("projector", 8), ("language", 3), ("joint", 3)):
        chain.hold(stage, step)
    shown = chain.submit()
    jobs = [chain.job(stage) for stage in STAGES]
    assert all(re.search(rf"{stage}\W+submit\W+{job}", shown) for stage, job in zip(STAGES, jobs, strict=True)), shown

    chain.until_step("projector", 8)
    chain.until((chain.run / "projector" / "step_00000005" / "manifest.json").exists, "the checkpoint of step 5")
    assert chain.submit().count("kept") == 3  # once more, while it runs
    call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    chain.until(lambda: chain.state("projector") != "RUNNING", "the failure of the node")
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], check=False)  # it may have come back itself
    chain.until(lambda: len(chain.attempts("projector", "begin")) == 2, "the second attempt")
    chain.let_go("projector")

    chain.until_step("language", 3)
    high = call(
        "sbatch", "--parsable", "-p", "gpu", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    ).strip()
    chain.until(lambda: chain.told("language", SAVING) == 1, "the signal of preemption")
    chain.let_go("language")
    chain.until(lambda: len(chain.attempts("language", "end")) == 1, "the end of the preempted attempt")
    assert chain.state("joint") == "PENDING"
    reached = chain.step("language")

    places = [0]
    for cut, held in ((1, 3), (2, 12)):
        chain.until_step("joint", held)
        call("scontrol", "update", f"jobid={chain.job('joint')}", "EndTime=now+60")
        chain.until(lambda: chain.told("joint", SAVING) == cut, f"signal {cut} that time runs out")  # noqa: B023
        chain.hold("joint", 12) if cut == 1 else chain.let_go("joint")
        chain.until(lambda: len(chain.attempts("joint", "end")) == cut, f"the end of slice {cut}")  # noqa: B023
        places.append(chain.step("joint"))
        longer = ["scontrol", "update", f"jobid={chain.job('joint')}", "TimeLimit=60"]  # the above has shortened it
        chain.until(lambda: not subprocess.run(longer, check=False).returncode, "a longer limit")  # noqa: B023
    chain.until_done()

    assert [line["at"] for line in chain.attempts("projector", "begin")] == ["projector:0", "projector:5"]
    assert [line["at"] for line in chain.attempts("language", "begin")] == ["language:0", f"language:{reached}"]
    assert call("sacct", "-X", "-n", "-o", "State", "-j", high).strip() == "COMPLETED"
    assert [line["code"] for line in chain.attempts("joint", "end")] == [75, 75, 0]
    assert [line["at"] for line in chain.attempts("joint", "begin")] == [f"joint:{step}" for step in places]
    assert 0 < places[1] < places[2] < STAGES["joint"]
    assert [chain.job(stage) for stage in STAGES] == jobs  # all of it under the same ids
    same_end(chain.config, reference)


def test_what_follows_is_preempted_and_goes_on(slurm: Path, tmp_path: Path, pairs: Path, reference: Config) -> None:
    """Probe, fine-tuning and evaluation behind a run that is trained; fine-tuning is preempted in mid-stage."""
    chain = Chain(tmp_path, pairs, "slurm.stages.vlm.partition=scavenge", "slurm.grace=90", "slurm.hours=1")
    shutil.copytree(reference.run_dir, chain.run)
    write_questions(tmp_path / "easyvqa")
    # a copy, for the jobs' code is a snapshot: to them the shipped set is any other, and gets its index beside it
    emoji = shutil.copytree(ROOT / "hive_scale" / "data" / "sample", tmp_path / "emoji")
    few = "stages.connector.max_steps=4 stages.language.max_steps=4"
    chain.hold("vlm", 2)
    shown = chain.submit(
        chain.held("vlm"),
        *("--then", "probe,vlm,evaluate"),
        f"after.probe=--set emoji --data {emoji} --heads linear --augment none --epochs 1",
        f"after.vlm=--config {vlm_recipe(tmp_path / 'easyvqa', f'{tmp_path}/easyvqa/train-*.tar')} {few}",
        f"after.evaluate=--tasks easyvqa --data {tmp_path} --max_tokens 2",
    )
    followers = ("probe", "vlm", "evaluate")
    jobs = [chain.job(name) for name in followers]
    assert (shown.count(" done "), shown.count(" submit ")) == (3, 3), shown

    chain.until_step("vlm/connector", 2)
    call("sbatch", "-p", "gpu", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    chain.until(lambda: chain.told("vlm", SAVING) == 1, "the signal of preemption")
    chain.let_go("vlm")
    chain.until(lambda: len(chain.attempts("vlm", "end")) == 1, "the end of the preempted attempt")
    assert chain.state("evaluate") == "PENDING"
    reached = chain.step("vlm/connector")
    chain.until_done(followers)

    assert 0 < reached < 4
    assert [line["at"] for line in chain.attempts("vlm", "begin")] == ["vlm, 0 bytes", f"vlm, connector:{reached}"]
    assert [line["code"] for line in chain.attempts("vlm", "end")] == [75, 0]
    assert [line["step"] for line in chain.lines("vlm/connector")] == [1, 2, 3, 4]
    assert [chain.job(name) for name in followers] == jobs
    assert json.loads((chain.run / "evaluation" / "results.json").read_text())["easyvqa"]["missing"] == 0
    assert (chain.run / "probes" / "emoji.json").is_file()
    assert chain.submit().count(" done ") == 6
