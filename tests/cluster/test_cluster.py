"""Chains of two-node jobs on a real Slurm: they end where a single process ends, and what cannot go on is cancelled."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from chains import SAVING, STAGES, Chain, call, pipeline, same_end

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


def test_a_chain_without_progress_ends(slurm: Path, tmp_path: Path, pairs: Path) -> None:
    """A job that is killed again and again before it can save gives up."""
    chain = Chain(tmp_path, pairs, "slurm.attempts=1")
    chain.hold("projector", 1)
    chain.submit()
    chain.until((chain.run / "projector" / "metrics.jsonl").exists, "the first attempt")
    call("scontrol", "requeue", chain.job("projector"))
    chain.until(lambda: chain.state("projector") == "FAILED", "the end")
    assert "1 attempts in a row began at projector:0" in pipeline("logs", str(chain.run), "projector")
