"""Every encoder family is the model that transformers has: features, pixels, gradients, loading, export.

Why: a family is a few lines about another library's class. Each can be wrong without an error: a norm left out, a token
too many dropped, places not rotated, other colours.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Aimv2Config,
    Aimv2Model,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2ForImageClassification,
    Siglip2Config,
    SiglipConfig,
    SiglipModel,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hive_scale.config import ModelConfig, PartConfig, TokenizerConfig
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.export.huggingface import export_encoder, export_llava
from hive_scale.model.build import encoder_only, init_model, meta_model, vision_config, with_full_configs
from hive_scale.model.encoders import EncoderFamily, Siglip, family_of, hidden_states, patches
from hive_scale.registry import ENCODERS, FUSION_NAMES
from hive_scale.run import find_encoder

pytestmark = pytest.mark.contract
SIZES = {name: value for name, value in tiny.SIGLIP.items() if name != "model_type"}
DINO = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | {"layerscale_value": 0.5}
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": SIZES,
    "clip_vision_model": SIZES | {"projection_dim": 32},
    "dinov2": DINO | {"mlp_ratio": 2},
    "dinov2_with_registers": DINO | {"mlp_ratio": 2, "num_register_tokens": 3, "use_swiglu_ffn": True},
    "dinov3_vit": SIZES | {"num_register_tokens": 4, "layerscale_value": 0.5, "use_gated_mlp": True},
    "aimv2_vision_model": SIZES,
    "ijepa": SIZES,
    "vit": SIZES,
}
LEADING = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 4, "dinov3_vit": 5, "vit": 1}
DEPTH = SIZES["num_hidden_layers"]
BYTES = open_tokenizer(TokenizerConfig()).stock
FAMILIES = pytest.mark.parametrize("family", TOWERS)


def part(family: str, **changes: Any) -> PartConfig:
    return PartConfig(config={"model_type": family} | TOWERS[family] | changes)


def config_of(family: str, fusion: str = "cross_attention", **changes: Any) -> ModelConfig:
    language = PartConfig(config=tiny.language(vocab_size=259))
    return ModelConfig(part(family, **changes), language, fusion=fusion, encoder_layer_ratio=0.5)


def shaken(model: torch.nn.Module) -> Any:
    """`model` with no weight at its first value: not zero, not one, no two norms alike."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return model.eval()


def stock(family: str, **changes: Any) -> Any:
    """Transformers' own model, of its own auto class."""
    return shaken(AutoModel.from_config(AutoConfig.for_model(family, **TOWERS[family] | changes)))


def some_pixels(side: int = tiny.IMAGE) -> Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_every_family_of_ours_is_tested() -> None:
    assert {*TOWERS} <= {*ENCODERS.names()}
    ours = {name for name in ENCODERS.names() if ENCODERS[name].__module__ == EncoderFamily.__module__}
    assert ours == {*TOWERS}


@pytest.mark.parametrize("changes", [{}, {"image_size": 37}], ids=["whole patches", "a remainder"])
@FAMILIES
@torch.no_grad()
def test_features_are_those_of_transformers_at_every_depth(family: str, changes: dict[str, Any]) -> None:
    tower, pixels = stock(family, **changes), torch.randn(2, 3, *[changes.get("image_size", tiny.IMAGE)] * 2)
    theirs = tower(pixels, output_hidden_states=True).hidden_states
    for mode in (False, True):  # training, too: a step must be repeatable
        ours = hidden_states(tower.train(mode), pixels, DEPTH)
        assert len(ours) == len(theirs) == DEPTH + 1
        for depth, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=f"depth {depth}")
    shown = patches(tower, ours[-1])
    assert shown.shape[1] == family_of(tower.config).num_patches(tower.config) == 16
    assert torch.equal(shown, ours[-1][:, LEADING.get(family, 0) :])


@FAMILIES
@torch.no_grad()
def test_patch_i_is_at_place_i(family: str) -> None:
    """A change of one patch's pixels changes that token of the embeddings alone."""
    tower, pixels = stock(family), torch.randn(1, 3, tiny.IMAGE, tiny.IMAGE)
    other = pixels.clone()
    other[:, :, 8:16, 16:24] += 1.0  # row 1, column 2 of 4
    before, after = (patches(tower, hidden_states(tower, one, 0)[0]) for one in (pixels, other))
    assert (before != after).any(-1)[0].nonzero().flatten().tolist() == [6]


@FAMILIES
def test_pixels_are_normalised_as_by_the_family_s_own_processor(family: str) -> None:
    made = ENCODERS[family]()
    image = numpy.random.default_rng(0).integers(0, 256, (tiny.IMAGE, tiny.IMAGE, 3), dtype=numpy.uint8)
    side = {"height": tiny.IMAGE, "width": tiny.IMAGE}
    cropped = {"size": {"shortest_edge": tiny.IMAGE}, "crop_size": side}
    sizes = cropped if made.image_mode == "crop" else {"size": side}
    theirs = made.processor(**made.settings, **sizes)(images=Image.fromarray(image), return_tensors="pt").pixel_values
    model = meta_model(config_of(family))
    ours = (torch.from_numpy(image).permute(2, 0, 1)[None].float() - model.pixel_mean) / model.pixel_std
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_colours_are_those_published() -> None:
    """Written out, since the settings of a processor are not on its class for all families."""
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    half = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    found = {name: (ENCODERS[name]().pixel_mean, ENCODERS[name]().pixel_std) for name in TOWERS}
    assert found == {
        **dict.fromkeys(("siglip_vision_model", "ijepa", "vit"), half),
        **dict.fromkeys(("clip_vision_model", "aimv2_vision_model"), clip),
        **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), imagenet),
    }


@FAMILIES
@torch.no_grad()
def test_an_exported_encoder_is_the_stock_model(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    ours = shaken(init_model(config, 0))
    mode = ours.family.image_mode
    export_encoder(config, dict(ours.named_parameters()), tmp_path, mode)
    theirs, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is ENCODERS[family].model
    assert {name for name in report["missing_keys"] if not name.startswith("pooler.")} == set()
    assert not report["unexpected_keys"]
    image = numpy.random.default_rng(0).integers(0, 256, (tiny.IMAGE, tiny.IMAGE, 3), dtype=numpy.uint8)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(images=Image.fromarray(image), return_tensors="pt")
    found = theirs.eval()(**pixels, output_hidden_states=True)
    expected = ours.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
    for one, other in zip(expected, found.hidden_states, strict=False):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    normal = (torch.from_numpy(image).permute(2, 0, 1)[None].float() - ours.pixel_mean) / ours.pixel_std
    whole = ours.vision(normal).last_hidden_state
    torch.testing.assert_close(whole, found.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert find_encoder(tmp_path) == tmp_path
    assert load_file(tmp_path / "model.safetensors")


@FAMILIES
@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_gradients_reach_exactly_what_is_read(fusion: str, family: str) -> None:
    model = init_model(config_of(family, fusion), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    model(**tiny.batch(2).inputs()).backward()
    unused = model.unused_parameters()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == unused
    for name, parameter in model.vision.named_parameters():
        if f"vision.{name}" not in unused and not name.endswith("k_proj.bias"):  # which a softmax ignores
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name
    deepest = max(model.encoder_depths)
    blocks = {f"vision.{name}" for block in model.blocks()["vision"][deepest:] for name in named(model.vision, block)}
    assert blocks
    assert blocks <= unused
    assert all(f"vision.{name}" in unused for name, _ in model.vision.named_parameters() if name.startswith(HEADS))
    assert "vision.embeddings.mask_token" not in {name for name, _ in model.named_parameters()} - unused


LLAVAS = ("dinov2", "aimv2_vision_model", "ijepa")  # beside those of test_export.py


@pytest.mark.parametrize("family", LLAVAS)
@torch.no_grad()
def test_a_baseline_is_exported_as_a_llava(family: str, tmp_path: Path) -> None:
    config = config_of(family, "concat")
    ours = tiny.sighted(init_model(config, 0).eval(), 2.0)
    export_llava(config, dict(ours.named_parameters()), tmp_path, BYTES, ours.family.image_mode)
    llava, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    pixels, tokens, count = some_pixels()[:1], torch.tensor([[1, 70, 80]]), ours.features_shape[1]
    normal = (pixels.float() - ours.pixel_mean) / ours.pixel_std
    image = llava.config.image_token_index
    ids = torch.tensor([[1, *[image] * count, 70, 80]])
    theirs = llava.eval()(input_ids=ids, pixel_values=normal).logits[:, count:, :259]
    expected = ours.logits(ours.language_forward(ours.encode_images(pixels), tokens))
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", sorted({*TOWERS} - {*LLAVAS, "siglip_vision_model", "clip_vision_model"}))
def test_what_a_llava_cannot_hold_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LLaVA .*: export it as hive"):
        export_llava(config_of(family, "concat"), {}, tmp_path, BYTES, "resize")


HEADS = ("post_layernorm.", "layernorm.", "norm.", "rms_norm.", "head.", "pooler.")


def named(tower: torch.nn.Module, block: torch.nn.Module) -> list[str]:
    own = {id(parameter) for parameter in block.parameters()}
    return [name for name, parameter in tower.named_parameters() if id(parameter) in own]


@FAMILIES
def test_half_precision_runs(family: str) -> None:
    """Some families convert pixels in their model's forward, which is not called here."""
    batch, config = tiny.batch(2), config_of(family)
    whole = init_model(config, 0)
    loss = whole(**batch.inputs())
    half = init_model(config, 0)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    torch.testing.assert_close(half(**batch.inputs()), loss, atol=0.0, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(whole(**batch.inputs()), loss, atol=0.0, rtol=0.02)
    seeing = encoder_only(config, dict(whole.named_parameters()), torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in seeing.vision.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found, expected = (model.features(model.encode(batch.pixels))[-1].float() for model in (seeing, whole))
    assert (found - expected).norm() < 0.05 * expected.norm()


def assert_loads(path: Path, tower: Any, **changes: Any) -> None:
    """The directory `path` makes an encoder with the weights and the features of `tower`."""
    language = PartConfig(config=tiny.language())
    model = init_model(ModelConfig(PartConfig(str(path), changes), language, encoder_layer_ratio=0.5), 0).eval()
    assert {parameter.dtype for parameter in model.vision.parameters()} == {torch.float32}
    theirs = dict(tower.float().named_parameters())
    for name, parameter in model.vision.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    pixels = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states
        for one, other in zip(hidden_states(model.vision, pixels, DEPTH), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("files", ["safetensors", "shards", "bin", "fp16"])
@FAMILIES
def test_weights_are_read_from_the_files_that_there_are(files: str, family: str, tmp_path: Path) -> None:
    tower = stock(family)
    if files == "fp16":
        for parameter in tower.parameters():  # not the buffers: rotary frequencies are float32 in every file
            parameter.data = parameter.data.half()
    tower.save_pretrained(tmp_path, max_shard_size="20kB" if files == "shards" else "5GB")
    if files == "shards":
        assert (tmp_path / "model.safetensors.index.json").is_file()
    if files == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    assert_loads(tmp_path, tower)


@FAMILIES
def test_a_field_may_be_changed_but_not_what_is_computed(family: str, tmp_path: Path) -> None:
    tower = stock(family)
    tower.save_pretrained(tmp_path)
    dropout = next(
        name for name in ("attention_dropout", "attention_probs_dropout_prob") if hasattr(tower.config, name)
    )
    assert_loads(tmp_path, tower, **{dropout: 0.1})
    config = replace(config_of(family), vision=PartConfig(str(tmp_path), {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="were trained with hidden_act="):
        init_model(config, 0)
    config = replace(config, vision=PartConfig(str(tmp_path)))
    told, full = (vision_config(one.vision).to_dict() for one in (config, with_full_configs(config)))
    differing = {name for name in told if told[name] != full.get(name)}
    assert differing <= {"_name_or_path", "architectures", "transformers_version"}


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_relatives_of_clip_bring_their_activation(act: str, tmp_path: Path) -> None:
    """MetaCLIP and DFN are CLIP with one or the other; only the weights' own config tells."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vision_config": SIZES | {"hidden_act": act}, "text_config": text | {"vocab_size": 99}}
    whole = shaken(CLIPModel(CLIPConfig(**sizes, projection_dim=16)))
    whole.save_pretrained(tmp_path / "whole")
    whole.vision_model.save_pretrained(tmp_path / "tower")
    for path in (tmp_path / "whole", tmp_path / "tower"):
        assert_loads(path, whole.vision_model)
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[act]
    config = replace(config_of("clip_vision_model"), vision=part("clip_vision_model", hidden_act=other))
    with pytest.raises(ValueError, match=f"trained with hidden_act={act} "):
        init_model(replace(config, vision=replace(config.vision, path=str(tmp_path / "tower"))), 0)


def test_whole_checkpoints_give_their_tower(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipConfig(vision_config=SIZES, text_config=text | {"vocab_size": 99})  # as SigLIP 2 of fixed size is
    aimv2 = Aimv2Config(vision_config=SIZES, text_config=text | {"vocab_size": 99}, projection_dim=16)
    for number, whole in enumerate((shaken(SiglipModel(siglip)), shaken(Aimv2Model(aimv2)))):
        whole.save_pretrained(tmp_path / str(number))
        assert_loads(tmp_path / str(number), whole.vision_model)
    for kind, family in ((ViTForImageClassification, "vit"), (Dinov2ForImageClassification, "dinov2")):
        labelled = shaken(kind(AutoConfig.for_model(family, **TOWERS[family])))
        labelled.save_pretrained(tmp_path / family)
        assert_loads(tmp_path / family, labelled.base_model)


@pytest.mark.parametrize("model_type", ["siglip2", "siglip2_vision_model"])
def test_images_without_a_fixed_size_are_refused(model_type: str, tmp_path: Path) -> None:
    config = Siglip2Config()
    (config if model_type == "siglip2" else config.vision_config).save_pretrained(tmp_path)
    for given in (PartConfig(str(tmp_path)), PartConfig(config={"model_type": model_type})):
        with pytest.raises(ValueError, match=r"no fixed size \(NaFlex\): take a SigLIP 2 of fixed size"):
            vision_config(given)


def test_a_family_that_is_not_there_is_refused_with_how_to_add_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "beit"}))
    for given in (PartConfig(str(tmp_path)), PartConfig(config={"model_type": "beit"})):
        with pytest.raises(
            ValueError, match=r"is of type beit: supported are .*; docs/extending.md says how to add a family"
        ):
            vision_config(given)


@pytest.mark.parametrize("key", ["image_size", "patch_size"])
@FAMILIES
def test_sides_that_are_pairs_are_refused(family: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is .*: give one number|its config makes no model"):
        vision_config(part(family, **{key: [8, 8]}))


def test_a_grid_that_is_no_square_is_refused_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Siglip, "num_patches", lambda self, config: 12)
    config = config_of("siglip_vision_model", "joint_attention")
    with pytest.raises(ValueError, match=r"needs a square grid of patches, and the encoder makes 12 .*positions=line"):
        meta_model(config)
    meta_model(replace(config, positions="line"))
    meta_model(replace(config, fusion="cross_attention"))


def test_weights_of_other_colours_are_refused(tmp_path: Path) -> None:
    """As those of the first DINO, which is a ViT."""
    stock("vit").save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.485, 0.456, 0.406]).save_pretrained(tmp_path)
    config = replace(config_of("vit"), vision=PartConfig(str(tmp_path)))
    with pytest.raises(ValueError, match=r"its processor's image_mean is \[0.485, .* that of vit here is \[0.5, "):
        init_model(config, 0)
    for said in ('{"image_mean": 0.5}', '{"image_std": null}', "[1]", "{", "{}"):  # right, or no word of it
        (tmp_path / "preprocessor_config.json").write_text(said)
        init_model(config, 0)
    (tmp_path / "preprocessor_config.json").write_text('{"image_std": ["x"]}')
    with pytest.raises(ValueError, match="image_std is"):
        init_model(config, 0)


def test_a_published_dinov2_whose_processor_makes_smaller_images_is_opened(tmp_path: Path) -> None:
    small = {"crop_size": {"height": 16, "width": 16}}
    for family in ("dinov2", "clip_vision_model"):
        tower = stock(family)
        tower.save_pretrained(tmp_path / family)
        made = ENCODERS[family]
        made.processor(**made.settings, **small).save_pretrained(tmp_path / family)
    assert find_encoder(tmp_path / "dinov2") == tmp_path / "dinov2"
    with pytest.raises(ValueError, match="makes images of 16 pixels, its encoder takes 32"):
        find_encoder(tmp_path / "clip_vision_model")
