"""A run starts from what it was told to: any part from any source, and every difference is named."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hive_scale import config as configs
from hive_scale import presets
from hive_scale.checkpoint.weights import find_weights, write_weights
from hive_scale.config import Config, ModelConfig, PartConfig
from hive_scale.model.build import for_stage, meta_model, vision_config
from hive_scale.model.encoders import encoder_depths
from hive_scale.model.hive import Hive
from hive_scale.pipeline import initial_model

CONNECTOR = "connector_weights"
PARTS = {"vision": ("vision.",), "language": ("language.",), CONNECTOR: ("projector.", "fusion.")}


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Hive]:
    """A run whose first stage is done, its directory and its model."""
    model = initial_model(tiny.model_config(), seed=9)
    run, stages = tmp_path_factory.mktemp("run"), {name: tiny_stage() for name in ("first", "second")}
    configs.save(Config(model=tiny.model_config(), stages=stages), run / "config.yaml")
    weights = dict(model.named_parameters())
    write_weights(run / "initial" / "weights.safetensors", {name: torch.zeros_like(w) for name, w in weights.items()})
    write_weights(run / "first" / "weights.safetensors", weights)
    write_weights(run / "sharded" / "weights.safetensors", weights, max_shard_bytes=50_000)
    tower = {name.removeprefix("vision."): w for name, w in weights.items() if name.startswith("vision.")}
    write_weights(run / "alone" / "tower.safetensors", {f"vision_model.{name}": w for name, w in tower.items()})
    return run, model


def tiny_stage() -> configs.StageConfig:
    return configs.StageConfig({"all": configs.GroupConfig(["*"], 1e-3)})


def same(ours: Hive, theirs: Hive, part: str) -> list[bool]:
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    return [torch.equal(a, b) for (name, a), (_, b) in pairs if name.startswith(PARTS[part]) and b.any()]


def begun(path: Path, **changes: Any) -> ModelConfig:
    """Every part from `path`, the shapes spelled out."""
    base = tiny.model_config(**changes)
    vision, language = (replace(part, path=str(path)) for part in (base.vision, base.language))
    return replace(base, vision=vision, language=language, connector_weights=str(path))


def test_every_part_from_a_run_its_stage_and_safetensors(donor: tuple[Path, Hive]) -> None:
    run, theirs = donor
    index = find_weights(run / "sharded" / "weights.safetensors")
    assert index is not None
    for path in (run, run / "first", run / "first" / "weights.safetensors", run / "sharded", index):
        ours = initial_model(begun(path), seed=0)
        assert all(all(same(ours, theirs, part)) for part in PARTS), path


def test_one_part_alone_and_the_shape_from_the_run(donor: tuple[Path, Hive]) -> None:
    run, theirs = donor
    for part in PARTS:
        base = tiny.model_config()
        change: Any = str(run) if part == CONNECTOR else PartConfig(str(run))  # no config: it is the run's
        ours = initial_model(replace(base, **{part: change}), seed=0)
        assert {name: all(same(ours, theirs, name)) for name in PARTS if name != CONNECTOR} == {
            name: name == part for name in PARTS if name != CONNECTOR
        }
        if part == CONNECTOR:
            assert all(same(ours, theirs, part))


def test_an_encoder_alone_under_its_published_names(donor: tuple[Path, Hive]) -> None:
    run, theirs = donor
    base = tiny.model_config()
    ours = initial_model(
        replace(base, vision=replace(base.vision, path=str(run / "alone" / "tower.safetensors"))), seed=0
    )
    assert all(same(ours, theirs, "vision"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision": tiny.SIGLIP | {"num_hidden_layers": 6, "intermediate_size": 48}},
            r"missing: encoder.layers.4.layer_norm1.bias, .* and 27 more; of another shape: "
            r"encoder.layers.0.mlp.fc1.bias \(64,\) instead of \(48,\), .* and ",
        ),
        ({"language": tiny.language(num_hidden_layers=5)}, r"missing: model.layers.4.input_layernorm.weight, .* and 4"),
        ({CONNECTOR: {"encoder_layer_ratio": 0.75}}, r"missing: fusion.layers.2.gate, .* and 8 more"),
    ],
)
def test_what_does_not_fit_is_named(donor: tuple[Path, Hive], change: dict[str, Any], message: str) -> None:
    ((part, fields),) = change.items()
    base = tiny.model_config(**(fields if part == CONNECTOR else {}))
    value: Any = str(donor[0]) if part == CONNECTOR else PartConfig(str(donor[0]), fields)
    with pytest.raises(ValueError, match=message):
        initial_model(replace(base, **{part: value}), seed=0)


def test_what_has_no_place_is_left_out_and_said(donor: tuple[Path, Hive], caplog: pytest.LogCaptureFixture) -> None:
    shallower = PartConfig(str(donor[0]), tiny.SIGLIP | {"num_hidden_layers": 3})
    with caplog.at_level(logging.WARNING):
        initial_model(replace(tiny.model_config(), vision=shallower, encoder_layer_ratio=0.67), seed=0)
    assert "left out: unexpected: encoder.layers.3." in caplog.text


def published(folder: Path, content: dict[str, Any]) -> str:
    """A directory that says of its weights what `content` says."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("part", "said", "message"),
    [
        ("vision", tiny.CLIP | {"hidden_act": "gelu"}, r"trained with hidden_act=gelu \(here quick_gelu\)"),
        (
            "vision",
            {"model_type": "clip", "vision_config": tiny.CLIP | {"layer_norm_eps": 1e-6}},
            "layer_norm_eps=1e-06",
        ),
        ("vision", tiny.CLIP | {"num_attention_heads": 4}, "num_attention_heads=4"),
        ("vision", tiny.SIGLIP, "is of type siglip_vision_model, its config here of type clip_vision_model"),
        ("vision", {"architecture": "vit_tiny", "pretrained_cfg": {}}, "is a timm model"),
        ("language", tiny.language(rope_theta=5e5), "rope_theta': 500000.0"),
        ("language", tiny.language(rms_norm_eps=1e-5), "rms_norm_eps=1e-05"),
        ("language", tiny.language() | {"model_type": "mobilellm", "hidden_act": "gelu"}, "hidden_act=gelu"),
        ("language", tiny.language() | {"quantization_config": {"quant_method": "awq"}}, r"quantized weights \(awq\)"),
    ],
)
def test_weights_compute_as_they_were_trained(tmp_path: Path, part: str, said: dict[str, Any], message: str) -> None:
    """A preset's config beside other weights: shapes would be missed, an activation would not."""
    given = {"vision": tiny.CLIP, "language": tiny.language()}[part]
    base = tiny.model_config()
    with pytest.raises(ValueError, match=rf"^model\.{part}.*{message}"):
        meta_model(replace(base, **{part: PartConfig(published(tmp_path / "other", said), given)}))  # type: ignore[arg-type]


def test_what_the_weights_say_in_other_words_or_not_at_all_is_no_difference(tmp_path: Path) -> None:
    base = tiny.model_config()
    scaled = {"rope_type": "linear", "factor": 2.0}
    old = tiny.language(rope_theta=5e5, rope_scaling=scaled, eos_token_id=[2, 3], torch_dtype="float16")
    new = tiny.language(rope_parameters=scaled | {"rope_theta": 5e5}, num_hidden_layers=3)
    # a family that transformers does not have, read as the one that is given
    foreign = {"model_type": "mobilellm", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None}
    for i, (said, given) in enumerate(((old, new), (foreign, tiny.language(rms_norm_eps=1e-5)))):
        meta_model(replace(base, language=PartConfig(published(tmp_path / str(i), said), given)))
    # nor what was never fetched from the hub: a plan needs no network
    meta_model(replace(base, language=PartConfig("nobody/has-this", tiny.language(rms_norm_eps=1e-5))))


def test_a_timm_model_or_packed_weights_without_a_config_say_so(tmp_path: Path) -> None:
    base = tiny.model_config()
    timm = published(tmp_path / "timm", {"architecture": "vit_tiny", "pretrained_cfg": {"num_classes": 0}})
    with pytest.raises(ValueError, match="is a timm model: give the same encoder as transformers has it"):
        meta_model(replace(base, vision=PartConfig(timm)))
    packed = published(tmp_path / "gptq", tiny.language() | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ValueError, match=r"quantized weights \(gptq\), which cannot be trained"):
        meta_model(replace(base, language=PartConfig(packed)))


def test_a_path_without_weights_or_without_shapes_says_so() -> None:
    base, path = tiny.model_config(), "/nowhere/tower.safetensors"
    with pytest.raises(ValueError, match=r"model.vision: /nowhere.* there are no weights"):
        initial_model(replace(base, vision=replace(base.vision, path=path)), seed=0)
    with pytest.raises(ValueError, match=r"holds weights alone: give model.vision.config, too"):
        meta_model(replace(base, vision=PartConfig(path)))


def test_weights_that_are_not_finite_are_named(donor: tuple[Path, Hive], tmp_path: Path) -> None:
    name = "vision.encoder.layers.1.mlp.fc1.bias"
    spoiled = {key: weight.detach().clone() for key, weight in donor[1].named_parameters()}
    spoiled[name][0] = torch.nan
    write_weights(tmp_path / "spoiled.safetensors", spoiled)
    with pytest.raises(ValueError, match=rf"^{name} would begin with values that are not finite"):
        initial_model(begun(tmp_path / "spoiled.safetensors"), seed=0)


def test_an_unfinished_run_has_nothing_to_begin_with(tmp_path: Path) -> None:
    configs.save(Config(model=tiny.model_config(), stages={"first": tiny_stage()}), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"every stage of .* is still to be done"):
        initial_model(begun(tmp_path), seed=0)


VIT = {"hidden_size": 36, "intermediate_size": 80, "num_hidden_layers": 9, "num_attention_heads": 3, "patch_size": 14}
MOBILELLM = tiny.language(rope_theta=5e4, num_hidden_layers=5) | {
    "model_type": "mobilellm",
    "tie_word_embeddings": False,
    "share_embedding": True,
    "auto_map": {"AutoConfig": "configuration_mobilellm.MobileLLMConfig"},
}


@pytest.mark.parametrize(
    ("vision", "language"),
    [
        (VIT | {"model_type": "siglip_vision_model", "image_size": 70}, MOBILELLM),
        ({"model_type": "siglip", "vision_config": VIT | {"image_size": 28}}, tiny.language("qwen2", hidden_size=36)),
        (
            {"model_type": "clip", "vision_config": VIT | {"image_size": 42}},
            tiny.language("qwen3", hidden_size=36),
        ),
    ],
    ids=["siglip and mobilellm", "a whole siglip and qwen2", "clip and qwen3"],
)
def test_a_users_encoder_and_llm_bring_their_own_sizes_into_a_preset(
    tmp_path: Path, vision: dict[str, Any], language: dict[str, Any]
) -> None:
    words = [
        f"model.vision.path={published(tmp_path / 'vit', vision)}",
        f"model.language.path={published(tmp_path / 'llm', language)}",
    ]
    run = presets.load("rtx3090", None, words)
    model = meta_model(run.model)
    assert model.vision.config.num_hidden_layers == 9
    assert model.encoder_depths == encoder_depths(9, run.model)
    assert (model.vision.config.hidden_size, model.language.config.hidden_size) == (36, language["hidden_size"])
    tied = model.language.get_output_embeddings().weight is model.language.get_input_embeddings().weight
    assert tied == language.get("share_embedding", language["tie_word_embeddings"])
    assert all(for_stage(run.model, stage)[1] for stage in run.stages.values())
    if language is MOBILELLM:
        assert model.language.config.rope_parameters["rope_theta"] == 5e4


def test_a_presets_own_config_comes_back_by_a_word(tmp_path: Path) -> None:
    own = presets.load("rtx3090", None, []).model.vision
    word = f"model.vision.path={tmp_path}"
    assert presets.load("rtx3090", None, [word]).model.vision == PartConfig(str(tmp_path))
    for back in ([word, "model.vision.config=preset"], ["model.vision.config=preset", word]):
        assert presets.load("rtx3090", None, back).model.vision == replace(own, path=str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text(f"preset: rtx3090\nmodel: {{vision: {{path: {tmp_path}}}}}\n")
    assert presets.load(None, file, ["model.vision.config=preset"]).model.vision == replace(own, path=str(tmp_path))
    file.write_text(f"preset: rtx3090\nmodel: {{vision: {{path: {tmp_path}, config: preset}}}}\n")
    assert presets.load(None, file, []).model.vision == replace(own, path=str(tmp_path))
    # what brings no config of its own takes the preset's: bare weights, the preset's own path, training from scratch
    for kept in ("tower.safetensors", own.path, ""):
        assert presets.load("rtx3090", None, [f"model.vision.path={kept}"]).model.vision.config == own.config
    with pytest.raises(ValueError, match="config=preset: the preset gives no config here"):
        presets.load("demo", None, ["model.language.config=preset"])


def test_a_changed_field_is_merged_into_the_paths_own_config(tmp_path: Path) -> None:
    path = published(tmp_path / "vit", tiny.SIGLIP | {"num_hidden_layers": 6})
    words = [f"model.vision.path={path}", "model.vision.config.attention_dropout=0.25"]
    made = vision_config(presets.load("paper_siglip", None, words).model.vision)
    assert (made.num_hidden_layers, made.attention_dropout) == (6, 0.25)
    other = presets.load("paper_siglip", None, [*words[:1], "model.vision.config.hidden_act=gelu"])
    with pytest.raises(ValueError, match=r"trained with hidden_act=gelu_pytorch_tanh \(here gelu\)"):
        vision_config(other.model.vision)


@pytest.mark.parametrize(("preset", "own"), [("rtx3090", "facebook/MobileLLM-350M"), ("debug", "bytes")])
def test_the_tokenizer_follows_the_llm(tmp_path: Path, preset: str, own: str, caplog: pytest.LogCaptureFixture) -> None:
    def tokenizer(*words: str, file: Path | None = None) -> str:
        return presets.load(preset, file, [*words]).data.tokenizer.path

    assert tokenizer() == own
    assert tokenizer("model.language.path=other/llm") == "other/llm"
    assert tokenizer("model.language.path=other/llm", "data.tokenizer.path=bytes") == "bytes"
    file = tmp_path / "mine.yaml"
    file.write_text("data: {tokenizer: {path: my/words}}")
    assert tokenizer("model.language.path=other/llm", file=file) == "my/words"
    run, llm = tmp_path / "run", tmp_path / "llm"
    for folder in (run, llm):
        folder.mkdir()
    (run / "config.yaml").write_text("")  # a directory without a tokenizer
    assert tokenizer(f"model.language.path={run}") == own
    assert not caplog.messages
    (llm / "config.json").write_text("{}")
    assert tokenizer(f"model.language.path={llm}", "data.tokenizer.path=bytes") == "bytes"
    assert not caplog.messages
    assert tokenizer(f"model.language.path={llm}") == own
    assert f"model.language.path={llm} has no tokenizer, and data.tokenizer.path={own} is used" in caplog.text
    (llm / "tokenizer.json").write_text("{}")
    assert tokenizer(f"model.language.path={llm}") == str(llm)


def test_a_mobilellm_that_shares_layers_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path / "llm", MOBILELLM | {"layer_sharing": True})
    with pytest.raises(ValueError, match="use the MobileLLM of the same size without LS"):
        meta_model(replace(tiny.model_config(), language=PartConfig(path)))
