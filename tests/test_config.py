"""A run is data: it survives saving and loading, and a typo is reported before any work is done."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from hive_scale import config, config_merge, presets
from hive_scale.config import GroupConfig, StageConfig
from hive_scale.registry import FUSION_NAMES
from hive_scale.schedule import lr_factor, warmup_steps

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 595_375  # LLaVA-CC3M-Pretrain-595K


def stage(**changes: object) -> StageConfig:
    return replace(StageConfig({"all": GroupConfig(["*"], lr=1e-3)}), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_a_saved_run_reloads_to_the_same_run(tmp_path: Path, name: str, fusion: str) -> None:
    last = list(presets.PRESETS[name]().stages)[-1]
    words = [f"stages.{last}.epochs=2.5", "data.workers=3", f"stages.{last}.data.train=[a.tar]"]
    run = presets.load(name, None, [f"fusion={fusion}", *words])
    assert run.model.fusion == fusion
    config.save(run, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == run
    assert presets.load(None, tmp_path / "config.yaml", []) == run


def test_words_override_files_and_files_override_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: debug\nfusion: concat\nsave_interval: 7\neval_interval: 7\n"
        "stages: {extra: {max_steps: 5, groups: {llm: {parameters: ['language.*'], lr: 1e-4}}}}\n"
    )
    run = presets.load(None, file, ["eval_interval=9", "stages.extra.max_steps=6"])
    assert (run.name, run.model.fusion, run.save_interval, run.eval_interval) == ("debug_concat", "concat", 7, 9)
    assert list(run.stages) == ["projector", "language", "joint", "extra"]
    assert run.stages["extra"].max_steps == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modle.fusion=concat"], "Did you mean: 'model'"),
        (["stages.joint.epoch=1"], "did you mean stages.joint.epochs"),
        (["stages.joint.epohcs=1"], "Did you mean one of: 'epochs'"),
        (["lr=1e-3"], "lr: there is no such key: did you mean stages.STAGE.groups.GROUP.lr, such as stages.joint"),
        (["learning_rate=1e-3"], "did you mean stages.STAGE.groups.GROUP.lr"),
        (["stages.joint.learning_rate=1"], "did you mean stages.joint.groups.GROUP.lr, such as stages.joint.groups.v"),
        (["stages.joint.groups.vision.learning_rate=1"], r"did you mean stages.joint.groups.vision.lr\?"),
        (["joint.lr=1"], "did you mean stages.joint.groups.GROUP.lr"),
        (["batch_size=8"], "did you mean stages.STAGE.global_batch or stages.STAGE.micro_batch"),
        (["stages.joint.batch_size=8"], r"did you mean stages.joint.global_batch or stages.joint.micro_batch\?"),
        (["epochs=3"], "did you mean stages.STAGE.epochs, such as stages.joint.epochs"),
        (["max_stpes=3"], "did you mean stages.STAGE.max_steps"),
        (["output_dir=x"], r"did you mean output\?"),
        (["output-dir=x"], r"did you mean output\?"),
        (["train=x"], r"did you mean data.train\?"),
        (["vision.path=x"], r"did you mean model.vision.path\?"),
        (["data.num_workers=2"], r"did you mean data.workers\?"),
        (["resume=true"], "resume: there is no such key: the same command resumes a run"),
        (["engine.bf16=true"], "engine.bf16: there is no such key: give engine.precision=bf16"),
        (["gradient_accumulation_steps=4"], "accumulation follows from stages.*.global_batch, stages.*.micro_batch"),
        (["data=x.tar"], r"data: keys of its own are wanted here, such as data\.train="),
        (["model=x"], r"model: keys of its own are wanted here, such as model\.vision\.path="),
        (["stages.jiont.epochs=1"], "did you mean joint"),
        (["fusion=conct"], "did you mean concat"),
        (["engine.precision=fp16"], "expected one of"),
        (["stages.joint.groups.vision.lr=fast"], "could not be converted"),
        (["output"], "not key=value"),
        (["data.max_tokens=1"], "leaves no room"),
        (["model.encoder_layer_ratio=0"], "above 0"),
        (["stages.joint.adapter=lora"], "such as stages.joint.adapter.kind=lora"),
        (["stages.joint.adapter.rank=0"], "stages.joint: adapter.rank=0, adapter.alpha=32: set both to 1 or more"),
        (["stages.joint.ema=2"], "stages.joint: ema=2 is a decay per step: set it from 0"),
        (["stages.joint.global_batch=0"], "at least 1"),
        (["stages.joint.data.trian=[a.tar]"], "stages.joint.data: trian: .* Did you mean: 'train'"),
        (["stages.joint.data.max_tokens=1"], "stages.joint.data: .* leaves no room"),
        (["stages.joint.data=a.tar"], "stages.joint.data"),
        (["data.train=[a.tar"], r"data.train=\[a.tar: not YAML: .* quotation marks"),
        (["name=a\nb"], r"name='a\\nb' cannot name a run"),
        (["name=../up"], "no '[.][.]'"),
        (["model.vision.config=3"], "model.vision.config"),
        (["data.train.a=b.tar"], r"data.train: a list is wanted here: \[a, b\]"),
        (["data.train[0]=a.tar"], r"data.train: a list is wanted here: \[a, b\]"),
        (["stages=[]"], "stages: keys of its own are wanted here"),
        (["stages.joint.data=[a.tar]"], "a list stands where keys are wanted"),
        (["data.tokenizer=bytes"], r"data.tokenizer: keys of its own .*tokenizer\.path="),
        (["stages.joint.groups.vision.lr=.nan"], "lr=nan"),
        (["stages.joint.groups.vision.weight_decay=-1"], "weight_decay=-1"),
        (["stages.joint.max_grad_norm=0"], "max_grad_norm=0 .*inf clips nothing"),
        (["stages.joint.max_steps=-1"], "steps=-1"),
        (["stages.joint.max_steps=0", "stages.joint.epochs=.inf"], "epochs=inf"),
        (["stages.joint.warmup_ratio=3"], "warmup_ratio=3 is a share"),
        (["guard.spike=.nan"], "guard.spike=nan"),
    ],
)
def test_bad_words_are_answered_with_a_remedy(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.load("debug", None, words)


def test_old_names_of_keys_are_read_and_answered_with_the_new_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [
        "stages.joint.steps=7",
        "stages.joint.data.window=9",
        "engine.shard=1",
        "model.density=0.5",
        "evidence=false",
    ]
    run = presets.load("debug", None, words)
    assert (run.stages["joint"].max_steps, run.data_of("joint").shuffle_window, run.engine.shard_size) == (7, 9, 1)
    assert (run.model.encoder_layer_ratio, run.blank_image_control) == (0.5, False)
    told = [record.getMessage() for record in caplog.records]
    assert (
        "config: stages.joint.steps is called stages.joint.max_steps now; the old name is read in this release" in told
    )
    assert len(told) == len(words)
    file = tmp_path / "mine.yaml"
    file.write_text("preset: debug\nhang_seconds: 7\nstages: {joint: {warmup: 0.5, data: {text: conversation}}}\n")
    run = presets.load(None, file, [])
    assert (run.watchdog_seconds, run.stages["joint"].warmup_ratio, run.data_of("joint").format) == (
        7,
        0.5,
        "conversation",
    )
    with pytest.raises(ValueError, match=r"stages\.joint\.steps is the old name of stages\.joint\.max_steps: give one"):
        presets.load(None, file, ["stages.joint={steps: 1, max_steps: 2}"])


def test_a_run_that_an_older_version_saved_opens_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = presets.load("debug", None, ["engine.shard_size=1"])
    text = config.to_yaml(run)
    for kind in (config.Config, config.ModelConfig, config.DataConfig, config.StageConfig, config.EngineConfig):
        for old, new in kind.OLD_NAMES.items():
            assert re.search(rf"^ *{new}: ", text, re.MULTILINE), new
            text = re.sub(rf"^( *){new}: ", rf"\1{old}: ", text, flags=re.MULTILINE)
    (tmp_path / "config.yaml").write_text(text)
    assert config.load(tmp_path / "config.yaml") == run
    assert not caplog.records


def test_a_stage_s_data_is_what_it_changes_of_the_run_s(tmp_path: Path) -> None:
    words = ["stages.joint.data.train=[a.tar]", "stages.joint.data.tokenizer.pad_token=<pad>", "data.workers=7"]
    run = presets.load("paper_siglip", None, words)
    own = run.data_of("joint")
    assert own == replace(run.data, train=["a.tar"], tokenizer=replace(run.data.tokenizer, pad_token="<pad>"))
    assert own.workers == 7
    assert run.data_of("language") == run.data
    # what the run changes later, the stage follows, also where it has been saved between
    config.save(run, tmp_path / "config.yaml")
    later = presets.load(None, tmp_path / "config.yaml", ["data.max_tokens=50"])
    assert later.data_of("joint") == replace(own, max_tokens=50)
    assert config.differences(run, presets.load("paper_siglip", None, words)) == []
    assert "stages.joint.data.train" in config.differences(run, presets.load("paper_siglip", None, []))


def test_one_value_given_in_two_ways_is_the_same_run() -> None:
    plain = presets.load("debug", None, [])
    spelled_out = presets.load("debug", None, ["stages.joint.data={max_tokens: 77, workers: 3}"])
    assert config.differences(plain, spelled_out) == []


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    for content in (b"a: [1", b"stages:\n\tjoint: {}", b"\xff\xfe\x00"):
        file = tmp_path / "mine.yaml"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"mine\.yaml: not YAML: "):
            presets.load("debug", file, [])


def test_ranges_of_shards_in_a_list() -> None:
    word = "data.train=[shards/{00000..00595}.tar, '3 x b/{0..9}.tar',plain.tar, 0.5 x {0..9}.tar]"
    shards = ["shards/{00000..00595}.tar", "3 x b/{0..9}.tar", "plain.tar", "0.5 x {0..9}.tar"]
    assert presets.load("debug", None, [word]).data.train == shards


@pytest.mark.parametrize(
    ("given", "shards"),
    [
        ("a.tar", ["a.tar"]),
        ("shards/{00000..00595}.tar", ["shards/{00000..00595}.tar"]),
        ("{00000..00595}.tar", ["{00000..00595}.tar"]),
        ("3 x my photos/*.tar", ["3 x my photos/*.tar"]),
        ("[shards/{0..5}.tar,3 x b/{0..9}.tar]", ["shards/{0..5}.tar", "3 x b/{0..9}.tar"]),
        ("[set/{a,b}-{0..9}.tar,c.tar]", ["set/{a,b}-{0..9}.tar", "c.tar"]),
        ("https://host/{0..9}.tar?x=1#2", ["https://host/{0..9}.tar?x=1"]),
    ],
)
def test_shards_are_named_by_one_text_or_a_list(tmp_path: Path, given: str, shards: list[str]) -> None:
    """In words, and in YAML wherever it takes such text unquoted or quoted."""
    file = tmp_path / "mine.yaml"
    for word in (f"data.train={given}", f"stages.joint.data.train={given}"):
        assert presets.load("debug", None, [word]).data_of("joint").train == shards
    texts = [given] if "a,b" not in given and "#" not in given else []
    texts += [] if given.startswith("[") else [f"'{given}'", f'"{given}"']
    for text in texts:
        for content in (
            f"data:\n  train: {text}  # it's mine\n",
            f"data: {{train: {text}}}",
            f"data: {{train: [{text}]}}",
        ):
            file.write_text(f"preset: debug\n{content}\n")
            if not (text.startswith("[") and "[[" in content):
                assert presets.load(None, file, []).data.train == shards, content
    run = presets.load("debug", None, [f"data.train={given}"])
    config.save(run, file)
    assert config.load(file) == run


def test_a_range_that_the_shell_expanded_is_not_cut_to_its_last_shard() -> None:
    for word in ("data.train=set/{}.tar", "data.train=[set/{}.tar]", "data.train=[set/{}.tar,more.tar]"):
        words = [word.format(i) for i in range(3)]
        with pytest.raises(ValueError, match=r"data\.train is given 3 times, .*put a range in quotation marks"):
            presets.load("debug", None, words)
    assert presets.load("debug", None, ["data.train=a.tar", "data.train=a.tar"]).data.train == ["a.tar"]


def test_held_out_data_are_shards_a_share_or_none(tmp_path: Path) -> None:
    def heldout(word: str) -> config.DataConfig:
        return presets.load("debug", None, [word]).data

    assert [heldout(f"data.heldout={none}").heldout for none in ("none", "None", "[]", "", "null", "[none]")] == [
        []
    ] * 6
    for share, value in (("5%", 0.05), ("[5%]", 0.05), ("0.2 %", 0.002), ("'12.5%'", 0.125)):
        assert heldout(f"data.heldout={share}").heldout_share == pytest.approx(value)
    assert heldout("data.heldout=a%.tar").heldout_share == 0
    own = presets.load("debug", None, ["stages.joint.data.heldout=none", "data.heldout=1%"])
    assert (own.data_of("joint").heldout, own.data_of("language").heldout_share) == ([], 0.01)
    config.save(own, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == own
    assert config.differences(own, presets.load("debug", None, ["data.heldout=none"])) != []
    for wrong, message in (
        ("0.05", "write a share as 5%"),
        ("0.2", "write a share as 20%"),
        ("200", "neither shards nor a share"),
        ("0%", "above 0% and below 100%"),
        ("100%", "above 0% and below 100%"),
        ("[5%,a.tar]", "give one share"),
    ):
        with pytest.raises(ValueError, match=message):
            heldout(f"data.heldout={wrong}")


def test_a_run_saved_before_the_limit_of_bad_samples_has_none(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    run = presets.load("debug", None, [])
    saved.write_text("\n".join(line for line in config.to_yaml(run).splitlines() if "max_bad_share" not in line))
    assert (run.data.max_bad_share, config.load(saved).data.max_bad_share) == (0.05, 1.0)


@pytest.mark.parametrize(
    "text", ["2024_05_01", "yes", "1e3", "runs/a #1", "`x`", "a: b", "@x", "{x}/[y]", "it's", "~x", "0x1f", "- a", " "]
)
def test_text_in_a_word_stays_as_it_was_typed(text: str, tmp_path: Path) -> None:
    run = presets.load("debug", None, [f"output={text}", f"stages.joint.data.tokenizer.path={text}", f"name=a{text}"])
    assert (run.output, run.data_of("joint").tokenizer.path, run.name) == (text, text, f"a{text}")
    config.save(run, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == run
    listed = presets.load("debug", None, [f"data.train=[{text}.tar,'q, {{r}}.tar']"])
    assert listed.data.train == [f"{text}.tar".strip(), "q, {r}.tar"]


@pytest.mark.parametrize(
    "text", ["name: yes", "name: 1.10", "data: {train: [a, on]}", "stages: {joint: {data: {tokenizer: {path: no}}}}"]
)
def test_a_truth_value_in_a_file_is_not_taken_for_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match="is no text to YAML: put what was meant in quotation marks"):
        presets.load("debug", tmp_path / "mine.yaml", [])


def test_quotation_marks_around_a_word_are_not_part_of_it() -> None:
    run = presets.load("debug", None, ["name='a: b'", 'output="x"', "log.wandb=off", "profile.steps=10:13"])
    assert (run.name, run.output, run.log.wandb, run.profile.window()) == ("a: b", "x", "off", (10, 13))


@pytest.mark.parametrize("name", ["../up", "/etc", "a\nb", "\x1b[31m", "[red]x", "a|b", "initial", ".git", "", "x "])
def test_a_stage_is_named_as_a_folder_of_the_run_can_be(name: str) -> None:
    run = presets.debug()
    with pytest.raises(ValueError, match="cannot name a stage"):
        replace(run, stages={name: run.stages["joint"]})


def test_braces_in_a_path_are_taken_as_they_are() -> None:
    run = presets.load("debug", None, ["output=runs/{x} {name}/{0}/{name.__class__}"])
    assert run.run_dir == Path("runs/{x} debug/{0}/{name.__class__}")


def test_a_config_of_another_family_takes_the_place_of_the_preset_s(tmp_path: Path) -> None:
    other = {"model_type": "qwen2", "vocab_size": 300}
    file = tmp_path / "mine.yaml"
    file.write_text("preset: debug\nmodel: {language: {config: {model_type: qwen2, vocab_size: 300}}}\n")
    words = ["model.language.config={model_type: qwen2, vocab_size: 300}"]
    assert presets.load("debug", None, words).model.language.config == other
    assert presets.load(None, file, []).model.language.config == other
    for nothing in ("{}", "null"):
        assert presets.load("debug", None, [f"model.vision.config={nothing}"]).model.vision.config == {}
    before = presets.debug().model.language.config
    same = presets.load(
        "debug", None, ["model.language.config.model_type=llama", "model.language.config.hidden_size=8"]
    )
    assert same.model.language.config == before | {"hidden_size": 8}


@pytest.mark.parametrize("launcher", ["launchers/pretrain.py", "slurm/submit_pipeline.py", "launchers/plan.py"])
def test_words_stand_before_and_after_options(launcher: str) -> None:
    """`--print_config` prints, the other two refuse what only the last word says."""
    last = {"launchers/pretrain.py": ["--print_config", "name=last"]}.get(launcher, ["modle=1"])
    line = [launcher, "eval_interval=3", "--ds_config", "ds_configs/zero2.json", "save_interval=7", *last]
    shown = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, check=False)
    if launcher == "launchers/pretrain.py":
        said = shown.stdout.splitlines()
        assert {"name: last", "eval_interval: 3", "save_interval: 7", "  ds_config: ds_configs/zero2.json"} <= {*said}
    else:
        assert (shown.returncode, shown.stderr.count("\n")) == (2, 1)
        assert "Did you mean: 'model'" in shown.stderr


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean paper_siglip"):
        presets.load("paper_sigclip", None, [])


def test_another_run_is_told_from_the_same_run_on_other_hardware() -> None:
    run = presets.load("debug", None, [])
    same = presets.load(
        "debug", None, ["output=x", "engine.shard_size=1", "stages.joint.micro_batch=8", "data.workers=2"]
    )
    other = presets.load("debug", None, ["stages.joint.global_batch=32"])
    assert config.differences(run, same) == []
    assert config.differences(run, other) == ["stages.joint.global_batch"]


@pytest.mark.parametrize(
    ("name", "steps", "warm"), [("projector", 2326, 70), ("language", 4652, 140), ("joint", 581, 18)]
)
def test_the_papers_iterations_and_warmups(name: str, steps: int, warm: int) -> None:
    paper = presets.load("paper_siglip", None, []).stages[name]
    assert paper.num_steps(PAIRS) == steps
    assert warmup_steps(steps, paper.warmup_ratio) == warm


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
    run = presets.load(
        "debug", None, ["log.wandb=off", "engine.cpu_offload=on", "engine.compile=off", "profile.steps=3:4"]
    )
    with pytest.raises(ValueError, match="set auto, true or false"):
        presets.load("debug", None, ["engine.compile=maybe"])
    with pytest.raises(ValueError, match="set a number of ranks"):
        presets.load("debug", None, ["engine.shard_size=-1"])
    assert presets.load("rtx3090", None, []).engine.compile == "auto"
    assert presets.load("rtx3090", None, ["engine.compile=on"]).engine.compile is True
    assert (run.log.wandb, run.engine.cpu_offload, run.engine.compile, run.profile.steps) == ("off", True, False, "3:4")
    assert presets.load("paper_siglip", None, ["model.vision.path="]).model.vision.path == ""
    for name in ("007", "1e3", "yes", "'2'"):
        assert presets.load("debug", None, [f"name={name}"]).name == name.strip("'")
    assert presets.load("debug", None, ["data.train=['it''s/{0..1}.tar', b's.tar]"]).data.train == [
        "it's/{0..1}.tar",
        "b's.tar",
    ]


def test_a_preset_s_arguments_in_a_file_are_checked_and_words_go_before_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: vlm\nencoder: there\nfusion: cross_attention\n")
    run = presets.load(None, file, ["fusion=concat"])
    assert (run.model.fusion, run.model.vision.path) == ("concat", "there")
    for content, message in (
        ("preset: [debug]", "did you mean debug"),
        ("preset: debug\nfusion: [concat]", "there is no fusion"),
        ("preset: vlm\nllm_only: maybe", "neither true nor false"),
        ("preset: vlm\nencoder: 3", "no directory's name"),
        ("preset:", "no stages"),
        ("", "no stages"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            presets.load(None, file, [])


def test_another_type_of_rotary_scaling_takes_the_place_of_the_preset_s() -> None:
    words = ["model.language.config.rope_parameters={rope_type: yarn, factor: 4.0}"]
    rope = presets.load("vlm", None, words).model.language.config["rope_parameters"]
    assert rope == {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500000.0}
    words = ["model.language.config.rope_parameters.factor=8.0"]
    rope = presets.load("vlm", None, words).model.language.config["rope_parameters"]
    assert rope == presets.LLAMA_1B["rope_parameters"] | {"factor": 8.0}


def test_a_run_saved_before_images_had_a_position_goes_on_as_it_began(tmp_path: Path) -> None:
    """Its conversations had their image behind the start token; a file of a few changes means today's default."""
    saved = tmp_path / "config.yaml"
    run = presets.load("debug", None, ["data.format=conversation"])
    lines = config.to_yaml(run).replace("  format:", "  text:").replace("  shuffle_window:", "  window:").splitlines()
    saved.write_text("\n".join(line for line in lines if "image_position" not in line))
    assert config.load(saved).data.image_position == "start"
    assert presets.load(None, saved, []).data.image_position == "start"
    assert presets.load(None, saved, ["data.image_position=user"]).data.image_position == "user"
    saved.write_text(config.to_yaml(run))
    assert config.load(saved).data.image_position == "user"
    saved.write_text("preset: debug\ndata: {format: conversation}\n")
    assert presets.load(None, saved, []).data.image_position == "user"


def test_keys_sorted_by_a_tool_do_not_reorder_the_stages(tmp_path: Path) -> None:
    run = presets.load("debug", None, [])
    saved = tmp_path / "config.yaml"
    config.save(run, saved)
    content = yaml.safe_load(saved.read_text())
    assert content["stage_order"] == ["projector", "language", "joint"]
    saved.write_text(yaml.safe_dump(content, sort_keys=True))
    assert saved.read_text().index("\n  joint:") < saved.read_text().index("\n  projector:")
    for loaded in (config.load(saved), presets.load(None, saved, []), presets.load("debug", saved, ["name=debug"])):
        assert loaded == run
        assert list(loaded.stages) == ["projector", "language", "joint"]
    del content["stage_order"]  # as an older version saved it
    saved.write_text(yaml.safe_dump(content, sort_keys=False))
    assert list(config.load(saved).stages) == ["projector", "language", "joint"]


@pytest.mark.parametrize(
    ("stages", "order", "found"),
    [
        ("b a c", "b a c", "b a c"),
        ("a b c", "b a c", "b a c"),  # sorted by a tool
        ("b new a", "b a", "b new a"),  # added by hand
        ("b c", "b a c", "b c"),  # removed by hand
        ("b last", "b c", "b last"),  # renamed by hand
        ("a b", "b b a", "b a"),
    ],
)
def test_stages_run_in_the_order_that_the_file_means(stages: str, order: str, found: str) -> None:
    assert config_merge.ordered(stages.split(), order.split()) == found.split()


def test_two_orders_of_stages_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage_order is b, a, c, and the stages stand as c, a, b: put them in one"):
        config_merge.ordered(["c", "a", "b"], ["b", "a", "c"])
    with pytest.raises(ValueError, match="stage_order does not name the stage 'new': add it where it belongs"):
        config_merge.ordered(["a", "b", "new"], ["b", "a"])
    (tmp_path / "mine.yaml").write_text("preset: debug\nstage_order: joint\n")
    with pytest.raises(ValueError, match="stage_order: a list of the stages' names is wanted here"):
        presets.load(None, tmp_path / "mine.yaml", [])
