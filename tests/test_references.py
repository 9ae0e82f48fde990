"""Formulas implemented a second time, by others or plainly, so that no error is on both sides of a test.

Why: if training and its tests share labels, masks, depths and rotations, both can be wrong. HIVE is written here in
plain PyTorch from the paper, sample by sample without padding; the baseline is Hugging Face's own LLaVA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText

from hive_scale.batch import Sample, collate
from hive_scale.config import ModelConfig, PartConfig, TokenizerConfig
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.export.huggingface import LLAVA, export_llava
from hive_scale.model.build import init_model
from hive_scale.model.encoders import hidden_states
from hive_scale.model.generate import generate
from hive_scale.model.hive import Hive

pytestmark = pytest.mark.contract
Weights = dict[str, Tensor]


# -- HIVE in plain PyTorch, float64 ----------------------------------------------------------------------------


def linear(x: Tensor, p: Weights, name: str) -> Tensor:
    made = x @ p[f"{name}.weight"].T
    return made + p[f"{name}.bias"] if f"{name}.bias" in p else made


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, p: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def heads(x: Tensor, width: int) -> Tensor:
    """(N, heads * h) to (heads, N, h)."""
    return x.view(len(x), -1, width).transpose(0, 1)


def rotate(x: Tensor, places: Tensor, theta: float = 10000.0) -> Tensor:
    """x (heads, N, h); places (N,) or (N, h / 2): channel i turns with channel i + h / 2, by place / theta^(2i/h)."""
    half = x.shape[-1] // 2
    angle = places.double().view(len(places), -1) * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x[..., :half], x[..., half:]
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat(turned, dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """(heads, N, h), (K, M, h) twice and bool (N, M) to (N, heads * h)."""
    repeat = len(query) // len(key)
    scores = query @ key.repeat_interleave(repeat, 0).mT / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(repeat, 0)).transpose(0, 1).flatten(1)


def encode(p: Weights, config: dict[str, Any], pixels: Tensor) -> list[Tensor]:
    """Hidden states (V, C) of one image, embeddings first; a class token stays."""
    clip = config["model_type"].startswith("clip")
    mean, std = (
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)) if clip else ((0.5,) * 3,) * 2
    )
    statistics = [torch.tensor(one, dtype=torch.float64).view(3, 1, 1) for one in (mean, std)]
    image = (pixels.double() / 255 - statistics[0]) / statistics[1]
    eps, width = 1e-5 if clip else 1e-6, config["hidden_size"] // config["num_attention_heads"]
    embed = "vision.embeddings.patch_embedding"
    x = F.conv2d(image[None], p[f"{embed}.weight"], p.get(f"{embed}.bias"), config["patch_size"])[0].flatten(1).T
    if clip:
        x = torch.cat([p["vision.embeddings.class_embedding"][None], x])
    x = x + p["vision.embeddings.position_embedding.weight"]
    x = layer_norm(x, p, "vision.pre_layrnorm", eps) if clip else x
    states = [x]
    for i in range(config["num_hidden_layers"]):
        at = f"vision.encoder.layers.{i}"
        n = layer_norm(x, p, f"{at}.layer_norm1", eps)
        q, k, v = (heads(linear(n, p, f"{at}.self_attn.{one}_proj"), width) for one in "qkv")
        x = x + linear(attend(q, k, v, None), p, f"{at}.self_attn.out_proj")
        n = linear(layer_norm(x, p, f"{at}.layer_norm2", eps), p, f"{at}.mlp.fc1")
        n = n * torch.sigmoid(1.702 * n) if clip else F.gelu(n, approximate="tanh")
        x = x + linear(n, p, f"{at}.mlp.fc2")
        states.append(x)
    return states


def project(x: Tensor, p: Weights, at: str) -> Tensor:
    """Paper 3.2 with a residual: W_s LN(x) + W_2 gelu(W_1 LN(x))."""
    n = layer_norm(x, p, f"{at}.norm", 1e-5)
    return linear(n, p, f"{at}.shortcut") + linear(F.gelu(linear(n, p, f"{at}.up")), p, f"{at}.down")


def query_transformer(x: Tensor, p: Weights, at: str, num_heads: int) -> Tensor:
    """BLIP-2's layers: queries attend to each other, then to the patches, then a feed-forward; a norm behind each."""
    patches = layer_norm(x, p, f"{at}.norm", 1e-5)
    made = layer_norm(p[f"{at}.queries"], p, f"{at}.query_norm", 1e-5)
    width = x.shape[1] // num_heads
    number = 0
    while f"{at}.layers.{number}.linear1.weight" in p:
        layer = f"{at}.layers.{number}"
        for norm, name, source in (("norm1", "self_attn", None), ("norm2", "multihead_attn", patches)):
            weights, biases = p[f"{layer}.{name}.in_proj_weight"].chunk(3), p[f"{layer}.{name}.in_proj_bias"].chunk(3)
            inputs = (made, made, made) if source is None else (made, source, source)
            q, k, v = (heads(one @ w.T + b, width) for one, w, b in zip(inputs, weights, biases, strict=True))
            mixed = linear(attend(q, k, v, None), p, f"{layer}.{name}.out_proj")
            made = layer_norm(made + mixed, p, f"{layer}.{norm}", 1e-5)
        between = F.gelu(linear(made, p, f"{layer}.linear1"))
        made = layer_norm(made + linear(between, p, f"{layer}.linear2"), p, f"{layer}.norm3", 1e-5)
        number += 1
    return linear(made, p, f"{at}.out")


def grid_places(num_visual: int, pairs: int, slot: int) -> Tensor:
    """(V, pairs): three quarters of the pairs turn by row (even ones) and column (odd), the rest by half a side."""
    side, on_grid = math.isqrt(num_visual), pairs - pairs // 4
    rows = []
    for row in range(side):
        for column in range(side):
            rows.append([(column if i % 2 else row) if i < on_grid else side // 2 for i in range(pairs)])
    return slot + torch.tensor(rows)


def reference(p: Weights, config: ModelConfig, model: Hive, sample: Sample) -> Tensor:
    """Sum of the token losses of one sample (paper eq. 1), in nats."""
    vision, language = config.vision.config, config.language.config
    width, eps = language["head_dim"], model.language.config.rms_norm_eps
    visual = []
    if sample.pixels is not None:
        clip = vision["model_type"].startswith("clip")
        states = encode(p, vision, sample.pixels)
        taken = [states[d][clip:] for d in model.encoder_depths]
        if config.fusion == "q_former":
            visual = [query_transformer(taken[0], p, "projector.0", vision["num_attention_heads"])]
        else:
            visual = [project(one, p, f"projector.{i}") for i, one in enumerate(taken)]
    tokens = torch.tensor(sample.tokens)
    length, slot = len(tokens), sample.image_slot
    joint, inserted = config.fusion == "joint_attention", config.fusion in ("deepstack", "q_former")
    x = p["language.model.embed_tokens.weight"][tokens]
    count = len(visual[-1]) if inserted and visual else 0
    if count:  # the deepest features stand in the text
        x = torch.cat([x[:slot], visual[-1], x[slot:]])
    place = torch.arange(len(x))
    causal = place[None] <= place[:, None]
    if joint and visual:  # text behind the image moves on by the side of its grid
        place = place + math.isqrt(len(visual[0])) * (place >= slot)
    for layer in range(language["num_hidden_layers"]):
        at, allowed = f"language.model.layers.{layer}", causal
        fused = layer in model.fusion.depths and bool(visual) and not inserted
        new = f"fusion.layers.{model.fusion.depths.index(layer)}" if fused else ""
        if config.fusion == "deepstack" and visual and 1 <= layer < len(visual):
            added = F.pad(visual[layer - 1], (0, 0, slot, len(x) - slot - count))
            x = x + added
        if fused:
            of_layer = visual[0 if config.fusion == "gated_cross_attention" else model.fusion.depths.index(layer)]
            seen = rms(of_layer, p[f"{new}.norm.weight"], eps)
            vk, vv = (heads(linear(seen, p, f"{new}.{one}_proj"), width) for one in "kv")
        if fused and not joint:  # paper 3.3 behind a gate
            q = heads(linear(rms(x, p[f"{new}.norm.weight"], eps), p, f"{new}.q_proj"), width)
            x = x + torch.tanh(p[f"{new}.gate"]) * linear(attend(q, vk, vv, None), p, f"{new}.o_proj")
        if fused and config.fusion == "gated_cross_attention":
            n = linear(rms(x, p[f"{new}.feed_forward.norm.weight"], 1e-6), p, f"{new}.feed_forward.up")
            x = x + torch.tanh(p[f"{new}.feed_forward.gate"]) * linear(F.gelu(n), p, f"{new}.feed_forward.down")
        n = rms(x, p[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (heads(linear(n, p, f"{at}.self_attn.{one}_proj"), width) for one in "qkv")
        q, k = rotate(q, place), rotate(k, place)
        if fused and joint:  # one softmax over the image and the text so far
            vk = rotate(vk, grid_places(vk.shape[1], width // 2, slot))
            sees = (torch.arange(length) >= slot)[:, None].expand(length, vk.shape[1])
            k, v, allowed = torch.cat([vk, k], 1), torch.cat([vv, v], 1), torch.cat([sees, causal], 1)
        x = x + linear(attend(q, k, v, allowed), p, f"{at}.self_attn.o_proj")
        n = rms(x, p[f"{at}.post_attention_layernorm.weight"], eps)
        n = F.silu(linear(n, p, f"{at}.mlp.gate_proj")) * linear(n, p, f"{at}.mlp.up_proj")
        x = x + linear(n, p, f"{at}.mlp.down_proj")
    head = p.get("language.lm_head.weight", p["language.model.embed_tokens.weight"])
    logits = rms(x, p["language.model.norm.weight"], eps) @ head.T
    predicted = logits.log_softmax(-1)
    # token i is predicted from those before it
    return -sum(
        (
            predicted[i - 1 + (count if i >= slot else 0), token]
            for i, token in enumerate(sample.tokens)
            if sample.is_target[i]
        ),
        torch.zeros(()),
    )


def doubled(model: Hive) -> Hive:
    """`model` in float64, pixels and losses too."""
    model = model.double()
    model.pixel_mean, model.pixel_std = model.pixel_mean.double(), model.pixel_std.double()

    def states(pixels: Tensor) -> list[Tensor]:
        return hidden_states(
            model.vision, (pixels.double() - model.pixel_mean) / model.pixel_std, max(model.encoder_depths)
        )

    def token_loss(rows: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(rows), ids, reduction="none")

    model.encode, model.token_loss = states, token_loss  # type: ignore[method-assign, assignment]
    return model


def some_samples(slots: Sequence[int] = (1,), text_only: int = 1) -> list[Sample]:
    made = tiny.samples(5, 3, longest=14, text_only=text_only)
    return [Sample(one.key, one.pixels, one.tokens, one.is_target, slots[i % len(slots)]) for i, one in enumerate(made)]


@pytest.mark.parametrize("slots", [(1,), (1, 3, 2)], ids=["captions", "conversations"])
@pytest.mark.parametrize("llm", ["llama", "qwen2"])
@pytest.mark.parametrize("tower", [tiny.SIGLIP | {"vision_use_head": False}, tiny.CLIP], ids=["siglip", "clip"])
@pytest.mark.parametrize(
    "fusion", ["cross_attention", "joint_attention", "deepstack", "gated_cross_attention", "q_former"]
)
def test_hive_is_the_paper_written_plainly(fusion: Any, tower: dict[str, Any], llm: str, slots: Any) -> None:
    language = tiny.language(llm, num_hidden_layers=5, tie_word_embeddings=llm == "llama")
    parts = PartConfig(config=tower), PartConfig(config=language)
    config = ModelConfig(*parts, fusion=fusion, encoder_layer_ratio=0.75, num_query_tokens=5, num_query_layers=2)
    model, random = init_model(config, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)  # where tanh(g) is not g
            else:  # copies differ from what they copy, biases from zero
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    model = doubled(model)
    samples = some_samples(slots)
    loss = model(**collate(samples, 0, tiny.IMAGE).inputs())
    loss.backward()
    plain = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = sum((reference(plain, config, model, sample) for sample in samples), torch.zeros(()))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    for name, parameter in model.named_parameters():
        wanted = plain[name].grad
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        largest = float(wanted.abs().max())
        assert float((parameter.grad - wanted).abs().max()) <= 1e-4 * largest + 1e-9, name


# -- the baseline is LLaVA -------------------------------------------------------------------------------------

BYTES = open_tokenizer(TokenizerConfig()).stock


def with_images(tokens: Sequence[int], slot: int, image: int, count: int) -> list[int]:
    return [*tokens[:slot], *[image] * count, *tokens[slot:]]


@pytest.mark.parametrize("slots", [(1,), (1, 3, 2)], ids=["captions", "conversations"])
@pytest.mark.parametrize(
    ("tower", "mode", "llm"),
    [(tiny.SIGLIP, "resize", "llama"), (tiny.CLIP, "crop", "qwen2"), (tiny.SIGLIP, "resize", "qwen3")],
    ids=["siglip-llama", "clip-qwen2", "siglip-qwen3"],
)
def test_the_baseline_is_hugging_faces_llava(tmp_path: Path, tower: Any, mode: Any, llm: str, slots: Any) -> None:
    """Loss, all gradients and what is written; ragged, and the first sample has no image."""
    language = tiny.language(llm, vocab_size=300, num_hidden_layers=3, bos_token_id=1, eos_token_id=1)
    config = ModelConfig(
        PartConfig(config=tower), PartConfig(config=language), fusion="concat", encoder_layer_ratio=0.5
    )
    model = tiny.sighted(init_model(config, 0), 2.0)
    export_llava(config, {name: p.detach() for name, p in model.named_parameters()}, tmp_path, BYTES, mode)
    llava = AutoModelForImageTextToText.from_pretrained(tmp_path).train()
    image, count, samples = llava.config.image_token_index, model.features_shape[1], some_samples(slots)
    batch = collate(samples, 0, tiny.IMAGE)
    loss = model(**batch.inputs())
    loss.backward()
    pixels = (batch.pixels.float() - model.pixel_mean) / model.pixel_std
    total = torch.zeros(())
    for i, sample in enumerate(samples):  # one by one: what padding does is ours to get right
        shown = {} if sample.pixels is None else {"pixel_values": pixels[i : i + 1]}
        number = 0 if sample.pixels is None else count
        flags = with_images([*map(int, sample.is_target)], sample.image_slot, 0, number)
        ids = with_images(sample.tokens, sample.image_slot, image, number)
        labels = [token if flag else -100 for token, flag in zip(ids, flags, strict=True)]
        out = llava(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), **shown)
        total = total + out.loss * sum(sample.is_target)
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    theirs = dict(llava.named_parameters())
    for name, parameter in model.named_parameters():
        there = next((a + name.removeprefix(b) for a, b in LLAVA.items() if name.startswith(b)), "")
        wanted = theirs[there].grad
        if parameter.grad is None or wanted is None:
            assert name in model.unused_parameters() or wanted is None
            continue
        wanted = wanted[: len(parameter)]  # theirs has a row for the image's token
        assert float((parameter.grad - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max()) + 1e-6, name
    model.eval()
    llava.eval()
    llava.generation_config.suppress_tokens = None
    seen = [i for i, sample in enumerate(samples) if sample.pixels is not None]
    prompts = [list(samples[i].tokens[:3]) for i in seen]
    ours = generate(model, batch.pixels, seen, prompts, 1, 8, [samples[i].image_slot for i in seen])
    for i, prompt, written in zip(seen, prompts, ours, strict=True):
        ids = torch.tensor([with_images(prompt, samples[i].image_slot, image, count)])
        with torch.no_grad():
            made = llava.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[i : i + 1],
                max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=0,
            )  # fmt: skip
        answer = made[0, ids.shape[1] :].tolist()
        assert written == (answer[: answer.index(1)] if 1 in answer else answer)


@torch.no_grad()
def test_the_image_decides_the_first_word_of_the_baseline() -> None:
    model = tiny.sighted(init_model(tiny.model_config("concat"), 0).eval(), 2.0)
    batch = tiny.batch(2)
    logits = [
        model.logits(model.language_forward(model.encode_images(pixels[None]), torch.tensor([[1]])))[0, 0]
        for pixels in batch.pixels
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@torch.no_grad()
def test_visual_keys_turn_as_the_llms_own_rotary_tables_do() -> None:
    """On a line, which is how text stands; yarn also scales what it turns."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    parts = PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(rope_parameters=yarn))
    model = init_model(ModelConfig(*parts, fusion="joint_attention", encoder_layer_ratio=0.5, positions="line"), 0)
    rotary, layer = model.language.model.rotary_emb, model.fusion.layers[0]
    assert rotary.attention_scaling > 1.05
    visual = torch.randn(1, 16, 48)
    key = layer.k_proj(layer.norm(visual)).view(1, 16, -1, 12).transpose(1, 2)
    cos, sin = rotary(visual, 1 + torch.arange(16)[None])
    turned = torch.cat([-key[..., 6:], key[..., :6]], dim=-1)
    torch.testing.assert_close(layer(visual)[0], key * cos[:, None] + turned * sin[:, None], atol=1e-5, rtol=1e-5)
