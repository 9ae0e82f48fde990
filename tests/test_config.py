"""A run is data: it survives saving, and a typo is answered before anything is spent."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from hive_scale import config, presets
from hive_scale.config import GroupConfig, StageConfig
from hive_scale.schedule import lr_factor, warmup_steps

FUSIONS = ("cross_attention", "joint_attention", "concat")
PAIRS = 595_375  # LLaVA-CC3M-Pretrain-595K


def stage(**changes: object) -> StageConfig:
    return replace(StageConfig({"all": GroupConfig(["*"], lr=1e-3)}), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_saved_run_reloads_to_the_same_run(tmp_path: Path, name: str, fusion: str) -> None:
    last = list(presets.PRESETS[name]().stages)[-1]
    run = presets.load(name, None, [f"fusion={fusion}", f"stages.{last}.epochs=2.5", "data.workers=3"])
    assert run.model.fusion == fusion
    config.save(run, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == run
    assert presets.load(None, tmp_path / "config.yaml", []) == run


def test_words_override_files_and_files_override_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: debug\nfusion: concat\nsave_interval: 7\neval_interval: 7\n"
        "stages: {extra: {steps: 5, groups: {llm: {parameters: ['language.*'], lr: 1e-4}}}}\n"
    )
    run = presets.load(None, file, ["eval_interval=9", "stages.extra.steps=6"])
    assert (run.name, run.model.fusion, run.save_interval, run.eval_interval) == ("debug_concat", "concat", 7, 9)
    assert list(run.stages) == ["projector", "language", "joint", "extra"]
    assert run.stages["extra"].steps == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modle.fusion=concat"], "Did you mean: 'model'"),
        (["stages.joint.epoch=1"], "Did you mean: 'epochs'"),
        (["stages.jiont.epochs=1"], "did you mean joint"),
        (["fusion=conct"], "did you mean concat"),
        (["engine.precision=fp16"], "expected one of"),
        (["stages.joint.groups.vision.lr=fast"], "could not be converted"),
        (["output"], "not key=value"),
        (["data.max_tokens=1"], "leaves no room"),
        (["model.density=0"], "above 0"),
        (["stages.joint.global_batch=0"], "at least 1"),
    ],
)
def test_bad_words_are_answered_with_a_remedy(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.load("debug", None, words)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean paper_siglip"):
        presets.load("paper_sigclip", None, [])


def test_another_run_is_told_from_the_same_run_on_other_hardware() -> None:
    run = presets.load("debug", None, [])
    same = presets.load("debug", None, ["output=x", "engine.shard=1", "stages.joint.micro_batch=8", "data.workers=2"])
    other = presets.load("debug", None, ["stages.joint.global_batch=32"])
    assert config.differences(run, same) == []
    assert config.differences(run, other) == ["stages.joint.global_batch"]


@pytest.mark.parametrize(
    ("name", "steps", "warm"), [("projector", 2326, 70), ("language", 4652, 140), ("joint", 581, 18)]
)
def test_the_papers_iterations_and_warmups(name: str, steps: int, warm: int) -> None:
    paper = presets.load("paper_siglip", None, []).stages[name]
    assert paper.num_steps(PAIRS) == steps
    assert warmup_steps(steps, paper.warmup) == warm


@pytest.mark.parametrize(("samples", "batch", "steps", "warm"), [(558_128, 256, 2180, 66), (738_601, 64, 11540, 347)])
def test_the_papers_fine_tuning_iterations(samples: int, batch: int, steps: int, warm: int) -> None:
    assert stage(global_batch=batch, drop_last=True).num_steps(samples) == steps
    assert warmup_steps(steps, 0.03) == warm


def test_accumulation_is_arithmetic_that_must_come_out_even() -> None:
    assert stage(global_batch=256, micro_batch=32).accumulation(world_size=2) == 4
    assert stage(global_batch=6, micro_batch=32).accumulation(world_size=3) == 1
    with pytest.raises(ValueError, match="does not divide among 3 processes: use a multiple of 3, such as 255"):
        stage(global_batch=256).accumulation(3)
    with pytest.raises(ValueError, match="use micro_batch=32"):
        stage(global_batch=128, micro_batch=48).accumulation(2)
    with pytest.raises(ValueError, match="less than one global batch"):
        stage(global_batch=256, drop_last=True).num_steps(100)


def test_the_schedule_warms_up_to_the_peak_and_ends_at_its_minimum() -> None:
    factors = [lr_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1
    assert factors[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(factors[9:]))
    assert factors[54] == pytest.approx(0.6)  # half way down the cosine
    assert lr_factor(0, 1, 0.0, 0.1) == pytest.approx(0.1)


def test_words_say_what_they_say() -> None:
    run = presets.load("debug", None, ["log.wandb=off", "engine.offload=on", "engine.compile=off", "profile.steps=3:4"])
    assert (run.log.wandb, run.engine.offload, run.engine.compile, run.profile.steps) == ("off", True, False, "3:4")
    assert presets.load("paper_siglip", None, ["model.vision.path="]).model.vision.path == ""
