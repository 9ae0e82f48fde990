"""Studies: arms with equal steps and equal FLOPs, and the whole path from a base encoder to a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hive_scale import presets
from hive_scale.cli import named_run
from hive_scale.commands import submit_pipeline
from hive_scale.slurm import downstream
from launchers.reproduce import main
from launchers.reproduction import paper, studies
from launchers.reproduction.scales import smoke
from launchers.reproduction.studies import STUDIES, Arm, arms

ROOT = Path(__file__).parents[1]


def settings(folder: Path, steps: int) -> Path:
    """The smoke scale's pre-training with `steps` in each stage, as the file that a study writes."""
    scale = smoke(folder)
    path = folder / "pretrain.json"
    stages = {name: stage | {"max_steps": steps} for name, stage in scale.pretrain["stages"].items()}
    model = scale.pretrain["model"] | {"vision": {"config": scale.encoder}}
    path.write_text(json.dumps(scale.pretrain | {"stages": stages, "model": model}))
    return path


LATER = [pytest.param(study, marks=pytest.mark.slow) for study in ("depths", "density")]


@pytest.mark.parametrize("study", ["fusions", *LATER])
def test_arms_have_equal_steps_or_equal_flops(study: str, tmp_path: Path) -> None:
    changes = settings(tmp_path, steps=200)
    found = {(arm.variant, arm.budget): arm for arm in arms(study, "demo", changes, 0)}
    reference = found["cross_attention", "steps"]
    for (variant, budget), arm in found.items():
        assert presets.load("demo", changes, list(arm.words))
        for name, cost in arm.flops.items():
            if budget == "steps":
                assert arm.steps[name] == 200
            else:
                off = arm.steps[name] * cost - 200 * reference.flops[name]
                assert abs(off) <= cost / 2, "to half a step"
        assert budget == "steps" or arm.steps != found[variant, "steps"].steps
    if study == "fusions":
        dear = found["concat", "FLOPs"]  # for it sends the visual tokens through the LLM
        assert all(dear.steps[stage] < 200 for stage in dear.steps)


def test_every_arm_at_the_papers_size_is_one_that_the_pipeline_takes() -> None:
    for study, variants in STUDIES.items():
        for variant, words in variants.items():
            arm = Arm(variant, "FLOPs", words, {"projector": 7, "language": 8, "joint": 9}, {})
            trial = paper.Trial(study, arm)
            arguments = submit_pipeline._parser().parse_intermixed_args(trial.submission())
            plain, more = downstream.split(arguments.overrides)
            config = named_run(arguments, plain)
            assert [stage.max_steps for stage in config.stages.values()] == [7, 8, 9]
            assert list(downstream.read(arguments.then, more, config)) == ["probe"]
            commands = dict(trial.commands("python"))
            assert sum("--depth" in command for command in commands.values()) == len(paper.DEPTHS)


@pytest.mark.slow  # two dozen commands
def test_a_study_ends_in_a_table_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"fusions": {name: STUDIES["fusions"][name] for name in ("cross_attention", "concat")}}
    monkeypatch.setattr(studies, "STUDIES", few)
    (tmp_path / "emoji").symlink_to(ROOT / "hive_scale/data/sample")
    words = ["--study", "fusions", "--scale", "smoke", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
    assert main() == 0, capsys.readouterr().err
    first = capsys.readouterr().out
    rows: dict[str, Any] = json.loads((tmp_path / "out/figures.json").read_text())
    assert set(rows) == {"base", "cross_attention-steps", "concat-steps", "concat-FLOPs"}
    for key, row in rows.items():
        assert all(value > 0 for value in row["figures"]["emoji, block 4"])
        assert key == "base" or (len(row["captions"]) == 8 and row["figures"]["held-out loss"][0] > 0)
    assert rows["concat-steps"]["GFLOP per sample"] > rows["cross_attention-steps"]["GFLOP per sample"]
    assert (tmp_path / "out/figures.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out/steps/heldout-concat-steps-0.json").unlink()
    assert main() == 0
    second = capsys.readouterr().out
    assert [line.split()[1] for line in second.splitlines() if "launchers/" in line] == ["heldout-concat-steps-0:"]
    assert second.splitlines()[-4:] == first.splitlines()[-4:]


def test_a_study_has_the_data_it_needs_before_it_begins(tmp_path: Path) -> None:
    command = [sys.executable, "launchers/reproduce.py", "--study", "density", "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "fashion_mnist is not there: make it with launchers/prepare_data.py" in done.stderr
