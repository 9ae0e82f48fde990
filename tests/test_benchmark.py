"""Why: benchmarks are run by hand on machines of their own; here we see that they still run and contenders agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[1] / "launchers" / "benchmark.py"


def printed(*words: str) -> str:
    command = [sys.executable, str(LAUNCHER), *words, "--quick", "--rounds", "1", "--markdown"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one", "fsdp"])
def test_every_contender_takes_the_same_step(case: str) -> None:
    lines = printed("engines", "--cases", case, "--steps", "1").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
    assert [peer for _, _, peer, *_ in rows] == ["bare loop", "Accelerate", "Trainer"]
    assert all(float(ratio) > 0 for *_, ratio, _ in rows)


def test_every_way_to_the_loss_agrees() -> None:
    rows = printed("loss").splitlines()
    assert sum("target rows" in row for row in rows) == 3  # header, fp32, bf16
    assert sum("linear_cross_entropy" in row for row in rows) == 4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero2", "fsdp"])
def test_every_saver_brings_its_own_state_back(case: str) -> None:
    lines = printed("checkpoint", "--cases", case, "--ranks", "2", "--others", "1").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
    names = {"zero2": ["DeepSpeed save_checkpoint"], "fsdp": ["dcp.save", "dcp.async_save", "Accelerate save_state"]}
    assert [name for _, name, *_ in rows] == ["ours", *names[case]]
    assert float(rows[0][-1]) > 0  # another number of ranks


@pytest.mark.slow
def test_every_loader_that_is_installed_is_measured_and_ours_loses_nothing() -> None:
    lines = printed("data").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    raw = {row[1] for row in rows if row[0] == "raw"}
    assert {"ours", "webdataset", "ImageFolder"} <= raw
    decoded = [row for row in rows if row[0] == "decoded" and row[2] == "1"]
    assert {row[1] for row in decoded} == raw | {"bare decode loop"}
    assert all(float(row[5]) > 0 for row in decoded)
    [ours] = [row for row in rows if row[0] == "ours"]
    assert ours[-2:] == ["0", "0"], "lost and repeated samples after a change of ranks"


@pytest.mark.slow
def test_dealing_by_length_pads_less() -> None:
    rows = [line.strip("| ").split(" | ") for line in printed("padding").splitlines() if line.startswith("| 4 ")]
    shares = {way: float(padding.rstrip("%")) for _, way, padding, *_ in rows}
    assert shares["by length"] < shares["as they come"]


def test_an_unsharded_step_calls_hardly_more_operators_than_a_bare_loop() -> None:
    """Counts, which are exact; times are for the page. In joint, where most is trained, FSDP2 calls a third more."""
    rows = [line.strip("| ").split(" | ") for line in printed("host", "--stages", "joint").splitlines()]
    counts = {row[1]: int(row[-1].replace(",", "")) for row in rows if row[0] == "joint"}
    bare = counts["bare loop, bf16"]
    assert counts["hive_scale, bf16"] < 1.08 * bare
    assert counts["FSDP2 of each block, bf16"] > 1.3 * bare


@pytest.mark.slow  # each case is a process
def test_the_script_for_a_gpu_runs_on_a_cpu_and_its_losses_agree() -> None:
    lines = printed("gpu", "--stages", "projector", "--fusions", "cross_attention").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert [row[2] for row in rows if row[0] == "projector"] == ["eager", "eager"]
    assert [row[::2] for row in rows if row[0] in ("fp32", "bf16")] == [["fp32", "True"], ["bf16", "True"]]


@pytest.mark.slow
def test_efficiency_with_kept_features_leaves_the_encoder_out_of_both() -> None:
    words = ("efficiency", "--stages", "projector")
    plain, kept = (
        [line.strip("| ").split(" | ") for line in printed(*words, *more).splitlines() if line.startswith("| proj")]
        for more in ((), ("--features",))
    )
    assert [row[2] for row in plain] == [row[2] for row in kept] == ["cross_attention", "concat"]
    assert kept[0][4] == kept[0][5] == plain[0][5] < plain[0][4]  # of the baseline's FLOPs


def test_tables_of_a_page_are_made_again_in_their_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    old = "| what was there |\n"
    words = ("loss --rows 64 --dtypes fp32; quick: --vocabularies 500", "loss --rows none")  # the second fails
    page.write_text("\n".join(["above", *(f"<!-- benchmark {one} -->\n{old}<!-- end -->" for one in words), "below"]))
    assert "1 of 2 tables" in printed("all", "--page", str(page))
    first, second = page.read_text().split("<!-- end -->\n", 1)
    assert first.startswith(f"above\n<!-- benchmark {words[0]} -->\n| dtype |")
    assert first.count("| fp32 | 500 | 64 |") == 5
    assert "benchmark.py loss --rows 64 --dtypes fp32 --vocabularies 500 --rounds 2 --markdown" in first
    assert second == f"<!-- benchmark {words[1]} -->\n{old}<!-- end -->\nbelow"
