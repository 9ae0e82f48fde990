"""A run does what it says: it trains what each stage names and nothing else, resumes where it stopped, does nothing
when done, and refuses bad input before any training.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import tars
import tiny
import torch
from PIL import Image
from transformers import SiglipVisionModel

from hive_scale import config as configs
from hive_scale import presets
from hive_scale.checkpoint.format import StepCheckpoint
from hive_scale.checkpoint.stage_files import WEIGHTS, is_stage_done
from hive_scale.checkpoint.weights import read_weights
from hive_scale.checksums import SUMS
from hive_scale.config import Config, GroupConfig, KeepConfig, PartConfig
from hive_scale.distributed import World, session
from hive_scale.exit_codes import Stopped
from hive_scale.export import export_run
from hive_scale.model import build
from hive_scale.observability.console import console
from hive_scale.observability.metrics import read_metrics
from hive_scale.observability.stage_log import StageLog
from hive_scale.pipeline import run_pipeline
from hive_scale.preflight import Data, check, open_all, open_data
from hive_scale.report.report import report
from hive_scale.report.run_view import RunView
from hive_scale.report.summary import _next, blank_image_control, has_blank_image_control, heldout_losses, show
from hive_scale.seeding import seed_step
from hive_scale.strict_json import append_line

ROOT = Path(__file__).resolve().parents[1]
LLM = tiny.language(vocab_size=259, hidden_size=32)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as world:
        yield world


def small(output: Path, fusion: str = "cross_attention", steps: int = 4, **changes: Any) -> Config:
    """The debug preset with a tiny model and `steps` steps a stage, on the shipped images."""
    run = presets.load("debug", None, [f"fusion={fusion}", f"output={output}"])
    model = replace(
        run.model, vision=PartConfig(config=tiny.SIGLIP), language=PartConfig(config=LLM), encoder_layer_ratio=0.5
    )
    stages = {
        name: replace(stage, max_steps=steps, global_batch=8, micro_batch=4) for name, stage in run.stages.items()
    }
    return replace(
        run, model=model, stages=stages, blank_image_control=False, data=replace(run.data, heldout=[SOME]), **changes
    )


@pytest.fixture(scope="module", autouse=True)
def some_pairs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A dozen held-out pairs, so that looking at them costs little."""
    global SOME
    import webdataset

    folder = tmp_path_factory.mktemp("some")
    SOME = str(folder / "some.tar")
    data = open_data(replace(presets.debug(), output=str(folder)))
    with webdataset.TarWriter(SOME) as writer:
        for i in range(12):
            pixels = data.heldout.sample(i).pixels
            assert pixels is not None
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            writer.write({"__key__": f"{i:03d}", "jpg": image, "txt": data.heldout.caption(i), "json": {}})


def weights(config: Config, stage: str) -> dict[str, torch.Tensor]:
    return dict(read_weights(config.run_dir / stage / WEIGHTS).items())


@pytest.mark.parametrize(
    "fusion",
    [
        *("cross_attention", "joint_attention", "concat"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("deepstack", "gated_cross_attention", "q_former")),
    ],
)
def test_each_stage_changes_what_it_names_and_no_bit_of_the_rest(tmp_path: Path, world: World, fusion: str) -> None:
    config = small(tmp_path / "run", fusion)
    run_pipeline(config, world)
    before = weights(config, "initial")
    for name, stage in config.stages.items():
        after = weights(config, name)
        globs = [glob for group in stage.groups.values() for glob in group.parameters]
        named = {n for n in after if any(Path(n).match(glob) for glob in globs)}
        changed = {n for n in after if not torch.equal(before[n], after[n])}
        assert changed <= named, name
        # whole rows of the vocabulary, and what the encoder never reads, may see no gradient
        still = {n.split(".layers.3")[0] for n in named - changed}
        assert still <= {"vision.encoder", "vision.head", "vision.post_layernorm"} | {
            n for n in still if n.startswith(("vision.head.", "vision.post_layernorm."))
        }, name
        before = after


def test_a_run_leaves_what_it_promises(tmp_path: Path, world: World) -> None:
    config = small(tmp_path / "run", eval_interval=2)
    run_pipeline(config, world)
    for name, stage in config.stages.items():
        lines = read_metrics(config.run_dir / name / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["samples"] for line in lines] == [8, 16, 24, 32]
        assert {"tokens", "loss", "lr", "grad_norm", "seconds", "tflops_per_device"} <= lines[0].keys()
        assert set(lines[0]["lr"]) == set(stage.groups)
        assert ["eval_loss" in line for line in lines] == [False, True, False, True]
        SiglipVisionModel.from_pretrained(config.run_dir / name / "encoder")
    last = heldout_losses(config)
    assert last["joint"][-1] < last["projector"][0]


def test_a_stage_may_read_data_of_its_own(tmp_path: Path, world: World) -> None:
    config = small(tmp_path / "run", steps=2)
    stages = config.stages | {"language": replace(config.stages["language"], max_steps=0, data={"train": [SOME]})}
    config = replace(config, stages=stages)
    data = open_all(config)
    assert data["projector"] is data["joint"]
    assert data["language"].tokenizer.vocab_size == data["joint"].tokenizer.vocab_size
    run_pipeline(config, world, until="language")
    lines = read_metrics(config.run_dir / "language" / "metrics.jsonl")
    assert len(lines) == 2  # a dozen samples, eight a step; the run's own are 845


def test_a_finished_run_returns_at_once_and_can_be_started_over(tmp_path: Path, world: World) -> None:
    config = small(tmp_path / "run", steps=1)
    run_pipeline(config, world)
    made = (config.run_dir / "joint" / WEIGHTS).stat().st_mtime_ns
    started = time.monotonic()
    run_pipeline(config, world)
    assert time.monotonic() - started < 2
    assert (config.run_dir / "joint" / WEIGHTS).stat().st_mtime_ns == made
    run_pipeline(config, world, overwrite=True)
    assert (config.run_dir / "joint" / WEIGHTS).stat().st_mtime_ns > made


def test_a_run_may_end_after_a_stage(tmp_path: Path, world: World) -> None:
    config = small(tmp_path / "run", steps=1)
    run_pipeline(config, world, until="language")
    assert [is_stage_done(config.run_dir / name) for name in config.stages] == [True, True, False]
    run_pipeline(config, world, until="projector")
    assert not (config.run_dir / "joint").exists()


def test_a_shard_that_is_gone_is_missed_where_no_checkpoint_knows_of_it(tmp_path: Path, world: World) -> None:
    config = small(tmp_path / "run")
    shards = [Path(shard) for shard in tars.write_set(tmp_path / "set", [12, 12])]
    config = replace(config, data=replace(config.data, train=[str(tmp_path / "set" / "*.tar")]))
    run_pipeline(config, world, until="projector")
    away = shards[1].rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"language: .* 24 samples of data.train, and finds 12.*set-0001.tar is gone"):
        run_pipeline(config, world)
    away.rename(shards[1])
    run_pipeline(config, world)
    assert is_stage_done(config.run_dir / "joint")


def test_data_that_moved_are_those_it_began_with_and_changed_ones_are_named(tmp_path: Path, world: World) -> None:
    """Captions that change places, or an image with other bits, leave every sample its size and place."""

    def at(folder: str) -> Config:
        train, heldout = (str(tmp_path / folder / part / "*.tar") for part in ("train", "heldout"))
        config = small(tmp_path / "run")
        return replace(config, data=replace(config.data, train=[f"2 x {train}"], heldout=[heldout]))

    sets = [tars.write_set(tmp_path / "old" / part, [12, 12]) for part in ("train", "heldout")]
    run_pipeline(at("old"), world, until="projector")
    (tmp_path / "old").rename(tmp_path / "new")
    for part, shards in zip(("train", "heldout"), sets, strict=True):
        shard = tmp_path / "new" / part / Path(shards[1]).name
        content = shard.read_bytes()
        for change in ((b"w100", b"w1OO"), (b"JFIF", b"jfif")):
            shard.write_bytes(content.replace(*change, 1))
            with pytest.raises(ValueError, match=rf"language: .*24 samples of data.{part}.*{shard} has changed"):
                run_pipeline(at("new"), world)
        shard.write_bytes(content)
    once = replace(at("new").data, train=[at("new").data.train[0].removeprefix("2 x ")])
    with pytest.raises(ValueError, match=r"other data\.train"):  # as many samples, but in another order
        run_pipeline(replace(at("new"), data=once), world)
    run_pipeline(at("new"), world)
    assert is_stage_done(tmp_path / "run" / "joint")


def test_a_run_that_an_older_version_began_goes_on_by_what_that_noted(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run")
    config = replace(config, data=replace(config.data, train=tars.write_set(tmp_path / "set", [12, 12])))
    layout = open_data(config).train.layout
    with monkeypatch.context() as patch:  # its checkpoints hold what its data.json holds
        patch.setattr(Data, "names", [layout])
        log_step = StageLog.step

        def stop(self: StageLog, step: int, *arguments: Any) -> None:
            log_step(self, step, *arguments)
            signal.raise_signal(signal.SIGTERM)

        patch.setattr(StageLog, "step", stop)
        with pytest.raises(Stopped, match="projector stopped after step 2"):
            run_pipeline(config, world)
    note = config.run_dir / "data.json"
    old = {name: {"samples": 24, "fingerprint": layout} for name in config.stages}
    (config.run_dir / SUMS).unlink()
    note.write_text(json.dumps(old | {"projector": {"samples": 24, "fingerprint": "0" * 32}}))
    with pytest.raises(ValueError, match=r"projector: the run began with 24 samples of data\.train"):
        run_pipeline(config, world)
    note.write_text(json.dumps(old))
    run_pipeline(config, world, until="projector")
    assert json.loads(note.read_text())["joint"]["train"]["shards"].keys() == set(config.data.train)


def test_another_run_in_the_same_directory_is_refused(tmp_path: Path, world: World) -> None:
    run_pipeline(small(tmp_path / "run", steps=1), world)
    with pytest.raises(ValueError, match=r"another run \(other stages.joint.max_steps.*--overwrite"):
        run_pipeline(small(tmp_path / "run", steps=2), world)


def test_a_stopped_run_goes_on_to_the_same_end(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With dropout, so that random numbers count; though only one run looks at held-out data, and a disk forgets."""
    whole = _llm(small(tmp_path / "whole", steps=6, eval_interval=1), attention_dropout=0.3)
    run_pipeline(whole, world)
    cut = _llm(small(tmp_path / "cut", steps=6, save_interval=1), attention_dropout=0.3)
    log_step = StageLog.step

    def stop_in_the_second_stage(self: StageLog, step: int, *arguments: Any) -> None:
        log_step(self, step, *arguments)
        if (cut.run_dir / "language").exists() and step in (1, 3):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StageLog, "step", stop_in_the_second_stage)
    with pytest.raises(Stopped, match="language stopped after step 2 of 6"):
        run_pipeline(cut, world)
    lines = read_metrics(cut.run_dir / "language" / "metrics.jsonl")
    state = StepCheckpoint(cut.run_dir / "language" / "step_00000002").state
    assert (state["step"], state["samples"], state["tokens"]) == (2, 16, lines[-1]["tokens"])
    assert state["config"]["stages"].keys() == cut.stages.keys()
    assert state["code"].keys() == {"hive_scale", "torch", "transformers", "deepspeed"}
    with pytest.raises(Stopped, match="language stopped after step 4 of 6"):
        run_pipeline(cut, world)
    monkeypatch.undo()
    newest = cut.run_dir / "language" / "step_00000004" / "rank_00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    run_pipeline(cut, world)
    assert "step_00000004 refused: rank_00000.safetensors does not match its checksum" in caplog.text
    ours, theirs = weights(cut, "joint"), weights(whole, "joint")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in whole.stages:
        metrics = [read_metrics(c.run_dir / name / "metrics.jsonl") for c in (cut, whole)]
        cut_steps, whole_steps = ([(line["loss"], line["tokens"]) for line in lines] for lines in metrics)
        assert cut_steps == whole_steps


def test_a_stage_may_keep_the_moments_of_the_one_before(tmp_path: Path, world: World) -> None:
    name, moments = "projector.0.up.weight", []
    for keep in (False, True):
        config = small(tmp_path / str(keep), steps=2, save_interval=1)
        language = replace(config.stages["language"], carry_optimizer_state=keep)
        config = replace(config, stages=config.stages | {"language": language})
        run_pipeline(config, world, until="language")
        moments.append(checkpointed(config, "language", 1, name))
    before = checkpointed(config, "projector", 2, name)
    # from the same weights on the same data the first gradient is the same
    torch.testing.assert_close(moments[1] - moments[0], language.betas[0] * before, atol=1e-7, rtol=1e-4)
    assert before.any()
    # what is told of gradients takes the bias off the moments of all four steps, not of the stage's own two
    told = read_metrics(config.run_dir / "language" / "metrics.jsonl")[-1]["grad_rms"]["projector.0"]
    names = [name for name, _ in build.meta_model(config.model).named_parameters() if name.startswith("projector.0.")]
    squares = sum(float(checkpointed(config, "language", 2, name, "exp_avg_sq").sum()) for name in names)
    assert told == pytest.approx((squares / (1 - language.betas[1] ** 4)) ** 0.5, rel=1e-4)
    with pytest.raises(ValueError, match=r"stages.projector.carry_optimizer_state: no stage comes before"):
        run_pipeline(_stage(small(tmp_path / "first"), carry_optimizer_state=True), world)


def checkpointed(config: Config, stage: str, step: int, name: str, kind: str = "exp_avg") -> torch.Tensor:
    """A moment of a parameter."""
    snapshot = StepCheckpoint(config.run_dir / stage / f"step_{step:08d}")
    moment = torch.empty(snapshot.shapes[f"{kind}/{name}"]).flatten()
    snapshot.read(f"{kind}/{name}", 0, moment)
    return moment


def test_checkpoints_stay_as_the_config_says(tmp_path: Path, world: World) -> None:
    keep = KeepConfig(last=1, every=2, best=True)
    config = small(tmp_path / "run", steps=5, save_interval=1, eval_interval=3, keep=keep)
    run_pipeline(config, world, until="projector")
    steps = {int(path.name.removeprefix("step_")) for path in (config.run_dir / "projector").glob("step_*")}
    losses = {
        line["step"]: line["eval_loss"]
        for line in read_metrics(config.run_dir / "projector" / "metrics.jsonl")
        if "eval_loss" in line
    }
    assert steps == {2, 4, 5, min(losses, key=lambda step: losses[step])}
    assert losses.keys() == {3, 5}


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    words = ["data.heldout=[" + SOME + "]", f"output={tmp_path / 'run'}", "blank_image_control=false"]
    words += [f"stages.{name}.max_steps=400" for name in ("projector", "language", "joint")]
    command = [sys.executable, "launchers/pretrain.py", "--preset", "debug", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "projector" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 75, shown
    assert "The same command goes on from there" in shown
    steps = len(read_metrics(metrics))
    assert (tmp_path / "run" / "projector" / f"step_{steps:08d}" / "manifest.json").exists()


def shown(config: Config, world: World, **how: Any) -> str:
    with console.capture() as text:
        show(config, world.device, **how)
    return text.get()


def test_the_outcome_tells_what_a_person_wants_to_know(tmp_path: Path, world: World) -> None:
    shards = [tars.write_tar(tmp_path / "mine.tar", [("a", tars.pair(0)), ("b", {"jpg": b"none", "txt": b"b"})]), SOME]
    config = small(tmp_path / "run", steps=2)
    config = replace(config, blank_image_control=True, data=replace(config.data, train=shards, max_bad_share=0.5))
    assert run_pipeline(config, world)
    run_pipeline(blank_image_control(config), world)
    append_line(config.run_dir / "bad_batches.jsonl", {"stage": "joint"})
    text = shown(config, world, preset="debug")
    assert text.startswith((config.run_dir / "outcome.txt").read_text())
    for word in (*config.stages, "truth:", "model:", "own image", "blank images", "encoder", "next"):
        assert word in text, word
    assert "unusable 1 samples were left out (1 x " in text
    assert "skipped  1 batch, for loss or gradient: " in text
    assert text.endswith(f"the same command with fusion=concat output={tmp_path}/run_concat\n")


def test_a_finished_run_has_nothing_to_do_and_says_since_when(tmp_path: Path, world: World) -> None:
    config = small(tmp_path / "run", steps=1)
    assert run_pipeline(config, world)
    first = shown(config, world)
    with console.capture() as header:
        assert not run_pipeline(config, world)
    assert not header.get()
    again = shown(config, world, trained=False)
    line, _, rest = again.partition("\n")
    assert re.fullmatch(r"nothing to do: finished on \d{4}-\d\d-\d\d \d\d:\d\d\. To train it again .*", line)
    assert rest == first
    # an older version saved colours, if it had a terminal, and the hint
    kept = config.run_dir / "outcome.txt"
    kept.write_text(f"\x1b[1mbold\x1b[0m\n{kept.read_text()}next     something else\n")
    assert shown(config, world, trained=False) == f"{line}\nbold\n{rest}"


def test_the_hint_fits_the_run(tmp_path: Path) -> None:
    hive, other = (
        replace(small(tmp_path / name, name), output=str(tmp_path / name)) for name in ("cross_attention", "concat")
    )
    by_preset = presets.load("debug", None, [])
    assert _next(by_preset, "debug").endswith("the same command with fusion=concat")
    assert _next(replace(by_preset, name="mine"), "debug").endswith("fusion=concat output=runs/mine_concat")
    assert _next(hive, "debug").endswith(f"fusion=concat output={hive.run_dir}_concat")
    assert "fusion=" not in _next(hive, ""), "the command named a file, which takes no fusion"
    assert _next(other, "debug").endswith(
        f"HIVE's cross-attention: the same command with fusion=cross_attention output={other.run_dir}_cross_attention"
    )
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "config.yaml").write_text("stages: [")
    for run in (hive, other):
        run.run_dir.mkdir()
        configs.save(run, run.run_dir / "config.yaml")
    for run in (hive, other):
        words = _next(run, "debug")
        assert "visualize report" in words
        assert str(hive.run_dir) in words
        assert str(other.run_dir) in words


def test_an_outcome_that_cannot_be_shown_whole_shows_the_rest(tmp_path: Path, world: World) -> None:
    """Training is done: a disk that went away since must not end the run in a traceback."""
    shard = Path(shutil.copy(SOME, tmp_path))
    config = small(tmp_path / "run", steps=2)
    config = replace(config, data=replace(config.data, heldout=[str(shard)]))
    run_pipeline(config, world)
    away = shard.rename(tmp_path / "away")
    text = shown(config, world)
    assert "training is done and saved, but not all of it can be shown: ValueError: " in text
    for word in (*config.stages, "weights  ", "encoder  ", "next  "):
        assert word in text, word
    away.rename(shard)
    assert "truth:" in shown(config, world)


def test_a_run_without_held_out_data_is_trained_shown_and_reported(tmp_path: Path, world: World) -> None:
    config = small(tmp_path / "run", steps=2, eval_interval=1)
    stages = {name: config.stages[name] for name in ("projector", "joint")}
    config = replace(config, stages=stages, data=replace(config.data, heldout=["none"]), blank_image_control=True)
    assert not has_blank_image_control(config)  # which compares held-out losses
    run_pipeline(config, world)
    lines = [line for name in config.stages for line in read_metrics(config.run_dir / name / "metrics.jsonl")]
    assert len(lines) == 4
    assert all("eval_loss" not in line and line["grad_rms"] for line in lines)
    with console.capture() as shown:
        show(config, world.device)
    for word in ("training loss, first", f"{lines[-1]['loss']:.4f}", "nothing is held out", "truth:", "next  "):
        assert word in shown.get(), word
    assert (config.run_dir / "outcome.txt").exists()
    found = report([RunView(config.run_dir)], images=1)
    assert any("run held nothing out" in note for note in found.notes)
    assert (found.runs[0]["held-out loss"], len(found.captions)) == ("-", 1)
    assert found.maps
    export_run("encoder", config.run_dir, tmp_path / "encoder")
    assert (tmp_path / "encoder" / "README.md").read_text().count("not measured") == 2
    run_pipeline(config, world)  # finished
    with pytest.raises(ValueError, match=r"keep\.best=true needs a held-out loss"):
        run_pipeline(replace(config, output=str(tmp_path / "best"), keep=KeepConfig(best=True)), world)
    assert not (tmp_path / "best").exists()


def test_a_share_that_is_held_out_stays_held_out_for_the_whole_run(tmp_path: Path, world: World) -> None:
    tars.write_set(tmp_path / "set", [20, 20])
    config = small(tmp_path / "run", steps=2)
    config = replace(config, data=replace(config.data, train=[str(tmp_path / "set")], heldout=["20%"]))
    run_pipeline(config, world, until="projector")
    noted = json.loads((config.run_dir / "data.json").read_text())["projector"]
    assert noted["train"]["samples"] + noted["heldout"]["samples"] == 40
    assert heldout_losses(config)["projector"]
    for other in (["30%"], [], [SOME]):
        with pytest.raises(ValueError, match=r"holds another run \(other data\.heldout\)"):
            run_pipeline(replace(config, data=replace(config.data, heldout=other)), world)
    run_pipeline(replace(config, data=replace(config.data, heldout_samples=3)), world)  # only evaluates less
    assert is_stage_done(config.run_dir / "joint")
    data = open_data(config)
    assert data.heldout is not None
    assert data.names[0] != replace(data, heldout=None).names[0]
    assert open_data(config).names == data.names
    read = {key for step in range(9) for key in data.train.keys(0, 8 * step, 8)}
    assert len(read) == noted["train"]["samples"]
    assert not read & {data.heldout.index.key(int(i)) for i in data.heldout.numbers}


def test_ones_own_images_beside_the_shipped_held_out_ones_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tars.write_set(tmp_path / "set", [20])
    base = small(tmp_path / "run", steps=1)
    own = {"train": [str(tmp_path / "set")], "heldout": ["sample:heldout"]}
    stage = replace(base.stages["joint"], data=own)
    config = replace(base, stages=base.stages | {"joint": stage}, data=replace(base.data, heldout=["sample:heldout"]))
    check(config, open_all(config, noted=False), {})
    (told,) = [record.getMessage() for record in caplog.records]
    assert "of the shipped emoji" in told
    assert "data.heldout=5% holds out a share of data.train, data.heldout=none nothing" in told


def test_held_out_data_that_are_trained_on_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tars.write_set(tmp_path / "set", [20])
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    base = small(tmp_path / "run", steps=1)
    for heldout, is_told in (("set", True), ("copy", True), ("5%", False)):
        own = str(tmp_path / heldout) if is_told else heldout
        config = replace(base, data=replace(base.data, train=[str(tmp_path / "set")], heldout=[own]))
        check(config, open_all(config, noted=False), {})
        assert ["is trained on, too" in record.getMessage() for record in caplog.records] == [True] * is_told
        caplog.clear()


def test_the_blank_twin_sees_nothing(tmp_path: Path) -> None:
    data = open_data(blank_image_control(small(tmp_path / "run")))
    pixels = data.train.sample(0).pixels
    assert pixels is not None
    assert pixels.unique().numel() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: _stage(c, global_batch=6), r"stages.projector: micro_batch=4 does not divide .* use micro_batch=3"),
        (lambda c: _stage(c, groups={"x": GroupConfig(["projektor.*"], 1e-3)}), "'projektor.*' matches no parameter"),
        (lambda c: replace(c, data=replace(c.data, train=["nowhere/*.tar"])), "data.train: no shard .*nowhere"),
        (lambda c: replace(c, data=replace(c.data, heldout=["nowhere/*.tar"])), "data.heldout: no shard .*nowhere"),
        (lambda c: replace(c, data=replace(c.data, train=[str(ROOT)])), "data.train: there are no tars in the folder"),
        (lambda c: _llm(c, vocab_size=100), "259 tokens, the LLM 100"),
    ],
)
def test_bad_input_is_refused_before_training(
    tmp_path: Path, world: World, change: Callable[[Config], Config], message: str
) -> None:
    config = change(small(tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        run_pipeline(config, world)
    assert not (tmp_path / "run" / "initial").exists()


def test_samples_that_were_set_aside_are_offered_where_none_are_named(tmp_path: Path, world: World) -> None:
    for name in ("train", "heldout"):
        tars.write_tar(tmp_path / f"{name}-00000.tar", [("a", tars.pair(0)), ("b", tars.pair(1))])
    config = small(tmp_path / "run")
    mine = replace(config.data, train=[f"{tmp_path}/train-*.tar"], heldout=["nowhere/*.tar"])
    with pytest.raises(ValueError, match=r"there is data.heldout='\[.*/heldout-\*\.tar\]'"):
        run_pipeline(replace(config, data=mine), world)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, folder: _ds(c, folder, {"gradient_clipping": 7.0}), "gradient_clipping=7.0 contradicts 1.0 of proj"),
        (lambda c, folder: replace(c, engine=replace(c.engine, shard_size=2)), "engine.shard_size=2 does not divide"),
        (lambda c, folder: _weights_at(c, folder / "nowhere"), "nowhere"),
        (lambda c, folder: _stage(c, data={"train": [str(folder / "*.tar")]}), "[*].tar"),
    ],
)
def test_a_refused_command_does_not_claim_the_directory(
    tmp_path: Path, world: World, change: Callable[[Config, Path], Config], message: str
) -> None:
    right = small(tmp_path / "run", steps=1)
    wrong = replace(change(right, tmp_path), eval_interval=1)
    with pytest.raises(ValueError, match=message):
        run_pipeline(wrong, world)
    assert not right.run_dir.exists()
    run_pipeline(right, world, until="projector")
    with pytest.raises(ValueError, match=message):
        run_pipeline(wrong, world, overwrite=True)
    assert is_stage_done(right.run_dir / "projector")  # nor does it empty what another has made


def _ds(config: Config, folder: Path, settings: dict[str, Any]) -> Config:
    path = folder / "mine.json"
    path.write_text(json.dumps(settings | {"zero_optimization": {"stage": 2}}))
    return replace(config, engine=replace(config.engine, ds_config=str(path)))


def _weights_at(config: Config, path: Path) -> Config:
    vision = replace(config.model.vision, path=str(path))
    return replace(config, model=replace(config.model, vision=vision))


def _stage(config: Config, **changes: Any) -> Config:
    return replace(config, stages=config.stages | {"projector": replace(config.stages["projector"], **changes)})


def _llm(config: Config, **changes: Any) -> Config:
    return replace(config, model=replace(config.model, language=PartConfig(config=LLM | changes)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "debgu"], "did you mean debug"),
        (["stages.joint.epoch=1"], "did you mean stages.joint.epochs?"),
        (["data.train=[/nowhere/x.tar]"], "/nowhere/x.tar"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    command = [sys.executable, "launchers/pretrain.py", *words, f"output={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_random_numbers_depend_on_seed_step_and_rank_alone() -> None:
    def draws(seed: int, step: int, rank: int) -> tuple[float, float, float]:
        seed_step(seed, step, rank)
        return random.random(), float(numpy.random.random()), float(torch.rand(()))

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first = [draws(*case) for case in cases]
    assert [draws(*case) for case in reversed(cases)] == first[::-1]
    assert all(len(set(column)) == len(cases) for column in zip(*first, strict=True))


def test_a_cut_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
