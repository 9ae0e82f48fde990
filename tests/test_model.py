"""The model is the paper's: pairing of depths, an unchanged LLM behind closed gates, causality, gradients where they
belong, and the sizes of the published parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel

from hive_scale.batch import collate
from hive_scale.config import ModelConfig, PartConfig
from hive_scale.export.huggingface import export_encoder
from hive_scale.model.attention import scaled_dot_product
from hive_scale.model.build import init_model, load_model, meta_model
from hive_scale.model.encoders import Clip, Siglip, covered, encoder_depths, group_ends, hidden_states, patches
from hive_scale.model.fusion.joint_attention import visual_positions
from hive_scale.presets import load
from hive_scale.registry import FUSION_NAMES
from hive_scale.registry import FUSIONS as FUSION_CLASSES

pytestmark = pytest.mark.contract
FUSIONS = FUSION_NAMES
FAMILIES = ("llama", "qwen2", "qwen3")


def open_gates(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.5)


def feature_maps(vision: Any, pixels: torch.Tensor, depths: Sequence[int]) -> list[torch.Tensor]:
    states = hidden_states(vision, pixels, max(depths))
    return [patches(vision, states[depth]) for depth in depths]


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_depths_and_pairing_are_those_of_the_published_lists() -> None:
    assert group_ends(32, 6) == (5, 11, 16, 21, 26, 31)
    assert group_ends(40, 8) == (4, 9, 14, 19, 24, 29, 34, 39)
    assert by_rule(24, 0.25, "uniform") == (3, 7, 11, 15, 19, 23)
    assert by_rule(24, 0.25, "later") == (18, 19, 20, 21, 22, 23)


def by_rule(num_layers: int, ratio: float, rule: Any) -> tuple[int, ...]:
    return encoder_depths(num_layers, ModelConfig(encoder_layers=rule, encoder_layer_ratio=ratio))


@pytest.mark.parametrize("rule", ["uniform", "later"])
def test_the_densest_depths_are_all_blocks_and_rarer_ones_leave_the_last_block_out(rule: Any) -> None:
    for layers in (2, 3, 4, 12, 24, 27):
        assert by_rule(layers, 1.0, rule) == tuple(range(1, layers + 1))
        for density in (0.01, 0.3, 0.5, 0.75, 0.9, 0.99):
            depths = by_rule(layers, density, rule)
            assert depths[0] > 0
            assert depths[-1] == layers - 1
            assert list(depths) == sorted({*depths})
            assert len(depths) == min(max(1, round(density * layers)), layers - 1)
    assert by_rule(24, 0.5, "uniform") == (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23)
    with pytest.raises(ValueError, match="an encoder of 1 block has no depth to tap"):
        by_rule(1, 0.25, rule)


def depths_of(**changes: Any) -> Any:
    return meta_model(tiny.model_config(**changes))


def test_one_layer_feeds_all_fused_ones_and_is_stored_and_projected_once() -> None:
    """The paper's cascaded fusion (supplement 6): only the encoder's deepest layer reaches the LLM."""
    model = depths_of(encoder_layers="last", encoder_layer_ratio=0.75)
    assert model.encoder_depths == (3,)
    assert model.fusion.depths == depths_of(encoder_layer_ratio=0.75).fusion.depths == (1, 2, 3)
    assert len(model.projector) == 1
    assert model.features_shape[0] == 1
    hive, batch = init_model(tiny.model_config(encoder_layers="last", encoder_layer_ratio=0.75), 0), tiny.batch(3)
    visual = hive.encode_images(batch.pixels)
    assert [one is visual[0] for one in visual] == [True] * 3
    hive(**batch.inputs()).backward()
    assert all(p.grad is not None for p in hive.projector.parameters())


def test_layers_are_listed_and_paired_as_one_wants() -> None:
    model = depths_of(encoder_layers=[1, 2, 4], llm_layers=[0, 2, 3])
    assert (model.encoder_depths, model.fusion.depths) == ((1, 2, 4), (0, 2, 3))
    assert not [name for name in model.unused_parameters() if ".layers." in name], "the last block is read"
    config = tiny.model_config(encoder_layers=[1, 3])
    pixels, straight = tiny.batch(2).pixels, init_model(config, 0)
    turned = init_model(replace(config, pairing="deep_to_shallow"), 0)
    assert turned.encoder_depths == straight.encoder_depths
    for one, other in zip(straight.encode_images(pixels), reversed(turned.encode_images(pixels)), strict=True):
        assert torch.equal(one, other)
    assert depths_of(fusion="concat").encoder_depths == (3,)
    assert depths_of(fusion="concat", encoder_layers=[4]).encoder_depths == (4,), "the final layer in place of LLaVA's"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": [0, 3]}, r"encoder_layers=\[0, 3\]: the encoder's layers are 1 to 4"),
        ({"encoder_layers": [3, 5]}, "the encoder's layers are 1 to 4"),
        ({"encoder_layers": [3, 1]}, "does not ascend: sort it; model.pairing=deep_to_shallow"),
        ({"encoder_layers": []}, "give whole numbers"),
        ({"encoder_layers": [1.5]}, "give whole numbers"),
        ({"encoder_layers": "middle"}, "set uniform, later, last, or a list"),
        ({"llm_layers": [1, 4]}, "the LLM's layers are 0 to 3, each at most once"),
        ({"llm_layers": [1, 1]}, "each at most once"),
        ({"llm_layers": [1]}, "has 1 layers, and 2 encoder layers feed them"),
        ({"fusion": "concat", "encoder_layers": [1, 2]}, "fusion=concat takes one"),
        ({"fusion": "concat", "llm_layers": [1]}, "fusion=concat fuses no LLM layers"),
        ({"fusion": "concat", "pairing": "deep_to_shallow"}, "fusion=concat fuses no LLM layers"),
    ],
)
def test_layers_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depths_of(**changes)


def test_the_colour_that_pads_is_llavas_and_what_patches_cover_is_whole_patches() -> None:
    assert Clip().mean_colour == (122, 116, 104)  # llava.mm_utils.expand2square is given these
    assert Siglip().mean_colour == (127, 127, 127)
    for image_size, side in ((32, 32), (33, 32), (39, 32), (40, 40)):
        model = meta_model(
            replace(tiny.model_config(), vision=PartConfig(config=tiny.SIGLIP | {"image_size": image_size}))
        )
        assert covered(model.vision) == side


def test_as_many_depths_as_llm_layers_pair_one_to_one() -> None:
    shallow = PartConfig(config=tiny.language(num_hidden_layers=3))
    model = meta_model(ModelConfig(PartConfig(config=tiny.SIGLIP), shallow, encoder_layer_ratio=0.75))
    assert model.encoder_depths == (1, 2, 3)
    assert model.fusion.depths == (0, 1, 2)
    assert model.features_shape == (3, 16, 32)  # 32 pixels in patches of 8


@pytest.mark.parametrize("llm", FAMILIES)
@torch.no_grad()
def test_shut_gates_leave_the_llm_as_it_was(llm: str) -> None:
    model = init_model(tiny.model_config(llm=llm), seed=0).eval()
    batch = tiny.batch()
    ours = model.logits(model.language_forward(model.encode_images(batch.pixels), batch.tokens))
    assert torch.equal(ours, model.language(batch.tokens).logits)
    open_gates(model)
    assert not torch.equal(model.logits(model.language_forward(model.encode_images(batch.pixels), batch.tokens)), ours)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("llm", FAMILIES)
@torch.no_grad()
def test_a_sample_without_image_is_plain_text(fusion: str, llm: str) -> None:
    model = init_model(tiny.model_config(fusion, llm), seed=0).eval()
    open_gates(model)
    batch = tiny.batch(3)
    has_image = torch.tensor([True, False, True])
    mixed = model.logits(model.language_forward(model.encode_images(batch.pixels), batch.tokens, has_image))
    alone = model.logits(model.language_forward(model.encode_images(batch.pixels), batch.tokens))
    torch.testing.assert_close(mixed[1], model.language(batch.tokens).logits[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(alone[1], mixed[1], atol=1e-3)


@pytest.mark.parametrize("family", [tiny.SIGLIP, tiny.CLIP])
@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_a_side_that_the_patch_does_not_divide_is_rounded_down_as_by_transformers(family: Any, fusion: str) -> None:
    base = tiny.model_config(fusion)
    config = replace(base, vision=PartConfig(config=family | {"image_size": 37}))
    model = init_model(config, seed=0).eval()
    pixels = torch.randint(0, 256, (2, 3, 37, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = model.encode_images(pixels)
    assert [one.shape[1] for one in seen] == [model.num_visual] * len(seen)
    assert model.num_visual == (64 if fusion == "q_former" else 16)
    assert model.features_shape[1] == 16
    stock = model.vision((pixels - model.pixel_mean) / model.pixel_std, output_hidden_states=True).hidden_states
    found = patches(model.vision, stock[model.encoder_depths[-1]])
    torch.testing.assert_close(model.features(model.encode(pixels))[-1], found, atol=1e-5, rtol=0)
    tokens = torch.tensor([[1, 5, 6]] * 2)
    assert model.language_forward(seen, tokens).shape == (2, 3, 48)
    edge = pixels.clone()
    edge[..., 32:] = 255 - edge[..., 32:]  # a part that no patch covers
    assert torch.equal(model.language_forward(model.encode_images(edge), tokens), model.language_forward(seen, tokens))


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_a_position_sees_no_later_token(fusion: str) -> None:
    model = init_model(tiny.model_config(fusion), seed=0).eval()
    open_gates(model)
    batch = tiny.batch(3)
    changed = batch.tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % tiny.VOCABULARY
    before, after = (
        model.language_forward(model.encode_images(batch.pixels), tokens) for tokens in (batch.tokens, changed)
    )
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


@torch.no_grad()
def test_the_baseline_is_the_llm_run_over_one_long_sequence() -> None:
    model = init_model(tiny.model_config("concat"), seed=0).eval()
    batch = tiny.batch(2)
    (visual,) = model.encode_images(batch.pixels)
    text = model.language.model.embed_tokens(batch.tokens)
    sequence = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)
    expected = model.language(inputs_embeds=sequence).logits
    ours = model.logits(model.language_forward([visual], batch.tokens))
    # the caption's first token is predicted from the last visual token
    torch.testing.assert_close(ours, expected[:, visual.shape[1] :], atol=1e-6, rtol=1e-5)


def test_grid_positions_turn_by_row_column_and_a_constant() -> None:
    places = visual_positions(num_visual=576, num_pairs=32, grid=True, device=torch.device("cpu"))
    token = 5 * 24 + 7  # row 5, column 7, counted from slot 1
    assert places[token].tolist() == [6, 8] * 12 + [13] * 8


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_selected_depth_receives_gradient(fusion: str) -> None:
    config = tiny.model_config(fusion)
    model = init_model(config, seed=0)
    open_gates(model)
    taps: list[torch.Tensor] = []
    batch = tiny.batch(2)

    def keep(features: list[torch.Tensor]) -> list[torch.Tensor]:
        for feature in features:
            feature.retain_grad()
        taps.extend(features)
        return features

    pixels = (batch.pixels.float() - model.pixel_mean) / model.pixel_std
    features = keep(feature_maps(model.vision, pixels, model.encoder_depths))
    hidden = model.language_forward(model.encode_images(torch.stack(features, dim=1)), batch.tokens)
    model.token_loss(hidden.flatten(0, 1)[batch.target_rows], batch.target_ids).sum().backward()
    assert len(taps) == len(model.encoder_depths)
    for depth, tap in zip(model.encoder_depths, taps, strict=True):
        assert tap.grad is not None, depth
        assert tap.grad.norm() > 0, depth


@pytest.mark.parametrize("tower", [tiny.SIGLIP, tiny.CLIP], ids=["siglip", "clip"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_parameters_without_gradient_are_those_called_dormant(fusion: str, tower: dict[str, Any]) -> None:
    model = init_model(replace(tiny.model_config(fusion), vision=PartConfig(config=tower)), seed=0)
    open_gates(model)
    model(**tiny.batch(2).inputs()).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == model.unused_parameters()


@torch.no_grad()
def test_the_loss_is_the_sum_over_targets_and_ignores_padding() -> None:
    model = init_model(tiny.model_config(), seed=0).eval()
    open_gates(model)
    samples = tiny.samples(4)
    whole = model(**collate(samples, 0, tiny.IMAGE).inputs())
    parts = sum(model(**collate([sample], 0, tiny.IMAGE).inputs()) for sample in samples)
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-5)
    batch = collate(samples, 0, tiny.IMAGE)
    logits = model.logits(model.language_forward(model.encode_images(batch.pixels), batch.tokens))
    labels = torch.full_like(batch.tokens, -100).flatten()
    labels[batch.target_rows] = batch.target_ids
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper_siglip", "paper_clip"])
def test_full_size_parts_have_their_published_sizes(preset: str) -> None:
    config = load(preset, None, []).model
    model = meta_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count(model.language) == 345_355_200
    assert len(model.fusion.depths) == len(model.encoder_depths) == 6
    assert model.fusion.depths == (5, 11, 16, 21, 26, 31)
    stock = SiglipVisionModel if preset == "paper_siglip" else CLIPVisionModel
    with torch.device("meta"):
        assert count(model.vision) == count(stock(model.vision.config))
    # six times: two layers of 960, their norm, and the shortcut from 1024
    assert count(model.projector) == 6 * (1024 * 960 + 960 + 960 * 960 + 960 + 2 * 1024 + 1024 * 960)


def test_llama_1b_has_its_published_size() -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
    llama = {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": scaling | {"original_max_position_embeddings": 8192},
        "tie_word_embeddings": True,
    }
    vision = load("paper_clip", None, []).model.vision
    model = meta_model(ModelConfig(vision, PartConfig(config=llama)))
    assert count(model.language) == 1_235_814_400
    assert model.language.config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize(("vision", "model"), [(tiny.SIGLIP, SiglipVisionModel), (tiny.CLIP, CLIPVisionModel)])
@pytest.mark.parametrize("llm", FAMILIES)
def test_parts_load_from_hugging_face_directories(tmp_path: Path, vision: dict[str, Any], model: Any, llm: str) -> None:
    fields = dict(vision)
    tower = model(AutoConfig.for_model(fields.pop("model_type"), **fields))
    fields = tiny.language(llm)
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    tower.save_pretrained(tmp_path / "vision")
    llama.half().save_pretrained(tmp_path / "language", max_shard_size="50kB")  # several files, as big checkpoints are
    assert len(list((tmp_path / "language").glob("*.safetensors"))) > 1
    config = ModelConfig(
        PartConfig(str(tmp_path / "vision")), PartConfig(str(tmp_path / "language")), encoder_layer_ratio=0.5
    )
    built = init_model(config, seed=0)
    assert {p.dtype for model in (built, meta_model(config)) for p in model.parameters()} == {torch.float32}
    for ours, theirs in ((built.vision, tower), (built.language, llama)):
        for name, parameter in theirs.named_parameters():
            assert torch.equal(ours.get_parameter(name), parameter), name
    # the injected layers start as copies of their hosts
    host = built.language.model.layers[built.fusion.depths[0]]
    assert torch.equal(built.fusion.layers[0].get_parameter("q_proj.weight"), host.self_attn.q_proj.weight)


@pytest.mark.parametrize("fusion", ["cross_attention", "joint_attention"])
def test_norms_of_visual_keys_start_as_the_hosts(fusion: str) -> None:
    config = tiny.model_config(fusion, "qwen3")
    model = init_model(config, seed=0)
    with torch.no_grad():  # all layers' norms are alike at first
        for number, layer in enumerate(model.language.model.layers):
            layer.self_attn.k_norm.weight.fill_(1.5 + number)
    fused = FUSION_CLASSES[fusion](model.host, model.language, len(model.encoder_depths), config)
    for depth, layer in zip(fused.depths, fused.layers, strict=True):
        assert torch.equal(layer.get_parameter("k_norm.weight"), torch.full((12,), 1.5 + depth))


def test_the_encoder_leaves_as_a_stock_directory(tmp_path: Path) -> None:
    config = tiny.model_config()
    model = init_model(config, seed=3)
    export_encoder(config, dict(model.named_parameters()), tmp_path / "encoder", "resize")
    loaded, report = SiglipVisionModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not report["missing_keys"]
    pixels = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE)
    with torch.no_grad():
        hidden = loaded(pixels, output_hidden_states=True).hidden_states
        for depth, ours in zip((1, 3), feature_maps(model.vision, pixels, (1, 3)), strict=True):
            torch.testing.assert_close(ours, hidden[depth])
    assert load_file(tmp_path / "encoder" / "model.safetensors")


@torch.no_grad()
def test_materialise_gives_the_assembled_model_back() -> None:
    config = tiny.model_config("joint_attention")
    model = init_model(config, seed=0).eval()
    again = load_model(config, {name: value.clone() for name, value in model.named_parameters()})
    batch = tiny.batch(2)
    assert torch.equal(model(**batch.inputs()), again(**batch.inputs()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": PartConfig(config=tiny.SIGLIP | {"patch_size": 33})}, "has no room for a patch of 33"),
        ({"vision": PartConfig(config=tiny.SIGLIP | {"hiden_size": 7})}, "did you mean hidden_size"),
        ({"vision": PartConfig(config=tiny.language())}, "supported are siglip_vision_model, clip_vision_model"),
        ({"language": PartConfig(config={"model_type": "gpt2"})}, "of type gpt2: supported are .*llama"),
        ({"vision": PartConfig(config=tiny.SIGLIP | {"image_size": [32, 32]})}, "image_size is .*one number"),
        ({"vision": PartConfig(config=tiny.SIGLIP | {"num_channels": 1})}, "num_channels is 1: images have 3"),
        (
            {"vision": PartConfig(config=tiny.SIGLIP | {"hidden_act": "x"})},
            "vision: its config makes no .*KeyError: 'x'",
        ),
        ({"vision": PartConfig(config=tiny.SIGLIP | {"hidden_size": "x"})}, "vision: its config makes no model"),
        (
            {"language": PartConfig(config=tiny.language(num_key_value_heads=3))},
            "does not divide the 4 attention heads",
        ),
        (
            {"language": PartConfig(config=tiny.language(rope_parameters={"rope_type": "x"}))},
            "language: its config makes",
        ),
        ({"language": PartConfig(path="./nowhere")}, "there is no 'nowhere' in"),
        ({"language": PartConfig()}, "neither path nor config"),
        (
            {"encoder_layer_ratio": 1.0, "language": PartConfig(config=tiny.language(num_hidden_layers=2))},
            "lower model.encoder_layer_ratio",
        ),
    ],
)
def test_a_bad_model_config_says_what_to_change(change: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {"vision": PartConfig(config=tiny.SIGLIP), "language": PartConfig(config=tiny.language())}
    with pytest.raises(ValueError, match=message):
        meta_model(ModelConfig(**(parts | change)))


@pytest.mark.parametrize("said", ["null", "[1]", '{"model_type": "llama", "hidden_size": "x"}', "{", '{"a": NaN}', ""])
def test_a_directory_s_config_that_is_none_is_refused_in_a_line(tmp_path: Path, said: str) -> None:
    (tmp_path / "config.json").write_text(said)
    for given in ({}, tiny.language(hidden_act="gelu")):
        model = ModelConfig(PartConfig(config=tiny.SIGLIP), PartConfig(str(tmp_path), given))
        with pytest.raises(ValueError, match=r"model\.language|no file named model\.safetensors"):
            init_model(model, seed=0)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    fields = tiny.language()
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    llama.save_pretrained(tmp_path)
    deeper = PartConfig(str(tmp_path), tiny.language(num_hidden_layers=6))
    with pytest.raises(ValueError, match="does not fit this model: missing: "):
        init_model(ModelConfig(PartConfig(config=tiny.SIGLIP), deeper, encoder_layer_ratio=0.5), seed=0)


@pytest.mark.parametrize("fusion", ["cross_attention", "joint_attention"])
@torch.no_grad()
def test_norms_of_queries_and_keys_make_their_size_irrelevant(fusion: str) -> None:
    """Weights ten times as large change nothing; in the layer as its host has it they do."""
    batch = tiny.batch(3)
    for qk_norm in (True, False):
        model = init_model(tiny.model_config(fusion, qk_norm=qk_norm), seed=0).eval()
        open_gates(model)
        before = model.language_forward(model.encode_images(batch.pixels), batch.tokens)
        for layer in model.fusion.layers:
            layer.k_proj.weight.mul_(10)
            if fusion == "cross_attention":
                layer.q_proj.weight.mul_(10)
        after = model.language_forward(model.encode_images(batch.pixels), batch.tokens)
        assert torch.allclose(before, after, atol=1e-4) == qk_norm


@pytest.mark.parametrize("fusion", [one for one in FUSIONS if one != "q_former"])
@pytest.mark.parametrize("llm", FAMILIES)
@torch.no_grad()
def test_attention_to_patches_is_what_the_fused_kernels_compute(fusion: str, llm: str) -> None:
    """Values moved by some delta at the patches move each row of the mix by its weights times delta."""
    model = init_model(tiny.model_config(fusion, llm, qk_norm=fusion == "joint_attention"), seed=0).eval()
    open_gates(model)
    batch = tiny.batch(3)
    visual = model.encode_images(batch.pixels)
    depth = model.visual_layers()[-1]
    weights = model.attention(visual, batch.tokens, [depth])[depth]
    host = model.language.model.layers[depth].self_attn
    values, mixer, inserted = host.v_proj, host.o_proj, fusion in ("concat", "deepstack")
    if not inserted:
        values = model.fusion.layers[-1].v_proj
    if fusion.endswith("cross_attention"):
        mixer = model.fusion.layers[-1].o_proj
    num_visual = visual[0].shape[1]
    delta = torch.randn(3, num_visual, 2, 12)  # key-value heads, head width
    mixes: list[torch.Tensor] = []
    mixer.register_forward_pre_hook(lambda _, inputs: mixes.append(inputs[0]))
    model.language_forward(visual, batch.tokens)

    def move(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        before, rest = (1, output.shape[1] - 1 - num_visual) if inserted else (0, 0)
        return output + torch.nn.functional.pad(delta.flatten(2), (0, 0, before, rest))

    values.register_forward_hook(move)
    model.language_forward(visual, batch.tokens)
    moved = mixes[1] - mixes[0]
    if inserted:
        moved = moved[:, num_visual:]
    expected = torch.einsum("bhtv,bvhd->bthd", weights, delta.repeat_interleave(2, dim=2)).flatten(2)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-4)


class AttentionCalls(TorchFunctionMode):
    """Of every call of torch's attention: heads of queries and keys, dtype, and whether torch is told of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[bool, torch.dtype]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[0], args[1]
            grouped = query.shape[1] != key.shape[1]
            assert grouped == (kwargs or {}).get("enable_gqa", False)
            self.found.add((grouped, query.dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_float32_never_meets_a_kernel_that_keeps_all_scores(fusion: str) -> None:
    """On GPUs no fused kernel takes groups of heads in float32: each gets as many heads of keys as of queries."""
    model, batch = init_model(tiny.model_config(fusion), seed=0), tiny.batch(3)
    open_gates(model)
    with AttentionCalls() as whole:
        loss = model(**batch.inputs())
    assert whole.found == {(False, torch.float32)}
    with AttentionCalls() as half:
        other = model.to(torch.bfloat16)(**batch.inputs())
    assert (True, torch.bfloat16) in half.found or fusion == "joint_attention", "a mask has them repeated, too"
    torch.testing.assert_close(loss, other, atol=0.0, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_repeated_heads_attend_as_grouped_ones(dtype: torch.dtype, is_causal: bool) -> None:
    made = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=made).to(dtype)
    key, value = (torch.randn(2, 2, 5, 8, generator=made).to(dtype) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=0.3, enable_gqa=True
    )
    found = scaled_dot_product(query, key, value, scale=0.3, is_causal=is_causal)
    torch.testing.assert_close(found, expected)
