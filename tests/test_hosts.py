"""Every LLM family, with what its layers have that Llama's have not, is run as transformers itself runs it.

The references are transformers' own forwards, with its own attention and masks. Weights, biases and norms are random,
so that nothing is left out unseen because it is zero or one.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration

from hive_scale.config import ModelConfig, PartConfig, TokenizerConfig
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.export import huggingface
from hive_scale.model.attention import attend, causal, windowed
from hive_scale.model.build import check_positions, init_model, load_model, meta_model, with_full_configs
from hive_scale.model.generate import Decoder, generate
from hive_scale.model.hive import Hive
from hive_scale.plan import flops
from hive_scale.registry import FUSION_NAMES, HOSTS

pytestmark = pytest.mark.contract
FIRST = ("cross_attention", "joint_attention", "concat"), ("llama", "olmo2", "gemma2")
MATRIX = [  # every family under every fusion; the first fusions, and some families under the others, are quick enough
    pytest.param(name, fusion, marks=() if fusion in FIRST[0] or name in FIRST[1] else pytest.mark.slow)
    for name in tiny.LLMS
    for fusion in FUSION_NAMES
]
BYTES = open_tokenizer(TokenizerConfig()).stock
IMAGES = torch.randint(0, 256, (2, 3, tiny.IMAGE, tiny.IMAGE), generator=torch.Generator().manual_seed(1)).byte()
NUM_VISUAL = (tiny.IMAGE // tiny.SIGLIP["patch_size"]) ** 2
KEYS: list[tuple[Tensor, Tensor]] = []  # keys and values that layers gave to `spy`


def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    KEYS.append((key, value))
    return attend(module, query, key, value, attention_mask, **options)


AttentionInterface.register("spy", spy)


def config_of(name: str, fusion: Any = "cross_attention", **changes: Any) -> ModelConfig:
    model_type, own = tiny.LLMS[name]
    language = tiny.language(model_type, **(own | changes))
    parts = PartConfig(config=tiny.SIGLIP), PartConfig(config=language)
    few = {"num_query_tokens": 5, "num_query_layers": 2}
    return ModelConfig(*parts, fusion=fusion, encoder_layer_ratio=0.5, **few)


def random_model(config: ModelConfig, gate: float) -> Hive:
    """A model whose every weight counts, with gates at `gate`."""
    model, random = init_model(config, 0).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(gate)
            else:
                spread = 0.2 if parameter.ndim > 1 else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=random) * spread)
    return model


@cache
def model_of(name: str, fusion: str = "cross_attention", gate: float = 0.0) -> Hive:
    return random_model(config_of(name, fusion), gate)


def untouched(model: Hive) -> Any:
    """transformers' own model, with its own attention, and the weights of `model`'s LLM."""
    config = deepcopy(model.language.config)
    auto: Any = AutoModelForCausalLM
    stock = auto.from_config(config, attn_implementation="eager")
    stock.load_state_dict(model.language.state_dict())
    return stock.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def test_every_family_is_in_the_matrix() -> None:
    assert {model_type for model_type, _ in tiny.LLMS.values()} == set(HOSTS.names()) - {"toy_llm"}


@pytest.mark.parametrize("name", tiny.LLMS)
@torch.no_grad()
def test_closed_gates_and_no_image_are_the_llm_itself(name: str) -> None:
    model, batch = model_of(name), tiny.batch(3, longest=20)
    expected = untouched(model)(batch.tokens).logits
    visual = model.encode_images(batch.pixels)
    close(model.logits(model.language_forward(visual, batch.tokens)), expected)
    close(model.language(batch.tokens).logits, expected)
    no_image = torch.zeros(3, dtype=torch.bool)
    for fusion in FUSION_NAMES:
        blind = model_of(name, fusion, 0.7)
        expected = untouched(blind)(batch.tokens).logits
        visual = blind.encode_images(batch.pixels)
        close(blind.logits(blind.language_forward(visual, batch.tokens, no_image)), expected)
        seeing = blind.logits(blind.language_forward(visual, batch.tokens))
        assert (seeing - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", tiny.LLMS)
@torch.no_grad()
def test_a_window_is_shorter_than_the_texts(name: str) -> None:
    """The matrix would show nothing otherwise: with a wide window the same weights compute something else."""
    fields = tiny.LLMS[name][1]
    if "sliding_window" not in fields:
        return
    tokens, model = tiny.batch(3, longest=20).tokens, model_of(name)
    wide = random_model(config_of(name, sliding_window=64), 0.0)
    assert (model.language(tokens).logits - wide.language(tokens).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", tiny.LLMS)
@torch.no_grad()
def test_the_baseline_is_the_llm_over_one_long_sequence(name: str) -> None:
    model, batch = model_of(name, "concat"), tiny.batch(2)
    (visual,) = model.encode_images(batch.pixels)
    text = model.host.embed(model.language, batch.tokens)
    sequence = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)
    # Granite's own forward multiplies whatever it is given
    given = sequence / getattr(model.language.config, "embedding_multiplier", 1.0)
    expected = untouched(model)(inputs_embeds=given).logits
    close(model.logits(model.language_forward([visual], batch.tokens)), expected[:, NUM_VISUAL:])


@pytest.mark.parametrize("name", tiny.LLMS)
@torch.no_grad()
def test_an_injected_layer_with_open_gate_is_its_hosts_attention(name: str) -> None:
    """Over all keys and without rotary positions; norms, scales and bounds are the host's. Its MLP is made to add 0."""
    wide = {"sliding_window": 64} if "sliding_window" in tiny.LLMS[name][1] else {}
    model = random_model(config_of(name, **wide), 20.0)
    fresh: Any = type(model.fusion)(model.host, model.language, len(model.encoder_depths), config_of(name))
    hidden = torch.randn(2, NUM_VISUAL, 48, generator=torch.Generator().manual_seed(3))
    for depth, layer in zip(fresh.depths, fresh.layers, strict=True):
        host: Any = model.host.layers(model.language)[depth]
        host.mlp.down_proj.weight.zero_()
        rotary = model.host.positions(model.language, hidden, torch.arange(NUM_VISUAL)[None])[depth]
        unturned = torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        sees_all = torch.ones(1, 1, NUM_VISUAL, NUM_VISUAL, dtype=torch.bool)
        expected = host(hidden, position_embeddings=unturned, attention_mask=sees_all)
        layer.gate.fill_(20.0)
        close(layer(hidden, hidden), expected)
        assert (expected - hidden).abs().max() > 1e-2


@pytest.mark.parametrize("name", tiny.LLMS)
@torch.no_grad()
def test_visual_keys_and_values_are_those_of_the_hosts_attention(name: str) -> None:
    """On a line, which is how text stands: rotated as the layer rotates, on the channels that it rotates, or not."""
    config = replace(config_of(name, "joint_attention"), positions="line")
    model = random_model(config, 0.0)
    fresh: Any = type(model.fusion)(model.host, model.language, len(model.encoder_depths), config)
    hidden = torch.randn(2, NUM_VISUAL, 48, generator=torch.Generator().manual_seed(3))
    places = 1 + torch.arange(NUM_VISUAL)[None]
    model.language.set_attn_implementation("spy")
    for depth, layer in zip(fresh.depths, fresh.layers, strict=True):
        host = model.host.layers(model.language)[depth]
        KEYS.clear()
        rotary = model.host.positions(model.language, hidden, places)[depth]
        host(hidden, position_embeddings=rotary, attention_mask=None)
        for found, expected in zip(layer(hidden), KEYS[0], strict=True):
            close(found, expected)


@pytest.mark.parametrize(("name", "fusion"), MATRIX)
@torch.no_grad()
def test_a_cache_writes_what_the_whole_text_does(name: str, fusion: str) -> None:
    model = model_of(name, fusion, 0.7)
    prompts, about = [[1, 5, 9, 11, 12, 40, 41, 42], [1, 7], [1, 30, 31, 32]], [1, 0, None]
    texts, has_image = [list(one) for one in prompts], torch.tensor([one is not None for one in about])
    image = torch.tensor([one or 0 for one in about])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in prompts], batch_first=True)
    decoder = Decoder(model, IMAGES, image, has_image)
    logits = decoder.prefill(tokens, torch.tensor([len(one) for one in prompts]), room=8)
    seen = model.encode_images(IMAGES)
    for step in range(8):
        for row, (text, shown) in enumerate(zip(texts, about, strict=True)):
            visual = [one[[shown or 0]] for one in seen]
            whole = model.language_forward(visual, torch.tensor([text]), has_image[[row]])
            expected = model.logits(whole[0, -1])
            torch.testing.assert_close(logits[row], expected, atol=2e-4 * max(1.0, float(expected.abs().max())), rtol=0)
            text.append(int(expected.argmax()))
        if step < 7:
            logits = decoder.decode_step(torch.tensor([text[-1] for text in texts]))
    written = generate(model, IMAGES, about, prompts, end_ids=-1, max_tokens=8)
    assert written == [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize(("name", "fusion"), MATRIX)
def test_gradients_are_finite_and_wherever_they_should_be(name: str, fusion: str) -> None:
    model = random_model(config_of(name, fusion), 0.7).train()
    model(**tiny.batch(3, text_only=1).inputs()).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in model.unused_parameters():
            assert parameter.grad is None, parameter_name
        else:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            # a bias of keys moves all scores of a row alike
            assert parameter.grad.any() or parameter_name.endswith("k_proj.bias"), parameter_name


@pytest.mark.parametrize("name", tiny.LLMS)
@torch.no_grad()
def test_a_family_comes_from_a_directory_and_leaves_as_one(name: str, tmp_path: Path) -> None:
    fields = config_of(name, vocab_size=259).language.config
    config = AutoConfig.for_model(**fields)
    auto: Any = AutoModelForCausalLM
    llm = auto.from_config(config).eval()
    for parameter in llm.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    llm.save_pretrained(tmp_path / "llm")
    assert load_file(tmp_path / "llm" / "model.safetensors")
    model_config = ModelConfig(PartConfig(config=tiny.SIGLIP), PartConfig(str(tmp_path / "llm")))
    model = init_model(model_config, 0).eval()
    tokens = tiny.batch(3, longest=20).tokens
    expected = llm(tokens).logits
    close(model.language(tokens).logits, expected)
    weights = {one: parameter.detach().clone() for one, parameter in model.named_parameters()}
    again = load_model(with_full_configs(model_config), weights)
    close(again.logits(again.language_forward(again.encode_images(IMAGES[:1]), tokens[:1])), expected[:1])
    huggingface.export_llm(model_config, weights, tmp_path / "out", BYTES)
    exported, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(exported.eval()(tokens).logits, auto.from_pretrained(tmp_path / "llm").eval()(tokens).logits)
    # the directory's config with a key of ours
    changed = ModelConfig(
        PartConfig(config=tiny.SIGLIP), PartConfig(str(tmp_path / "llm"), {"vocab_size": 259}), encoder_layer_ratio=0.5
    )
    close(init_model(changed, 0).eval().language(tokens).logits, expected)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_for_maps_are_those_that_mix_the_values(
    softcap: float | None, window: int | None, masked: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 8, generator=random) * 3
    key, value = (torch.randn(2, 2, 7, 8, generator=random) for _ in range(2))
    visual = (torch.randn(2, 2, 5, 8, generator=random), torch.randn(2, 2, 5, 8, generator=random)) if masked else None
    order = causal(7, query.device)
    mask = torch.cat([torch.ones(7, 5, dtype=torch.bool), order], dim=1)[None, None] if masked else None
    recorded: list[Tensor] = []
    options = {"scaling": 0.3, "softcap": softcap, "sliding_window": window, "dropout": 0.0}
    module = SimpleNamespace(num_key_value_groups=2)
    mixed, _ = attend(module, query, key, value, mask, visual=visual, recorded=recorded, **options)
    if visual:
        key, value = torch.cat([visual[0], key], 2), torch.cat([visual[1], value], 2)
    scores = 0.3 * query @ key.repeat_interleave(2, 1).mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    place = torch.arange(7)
    allowed = order if window is None else order & (place[:, None] - place < window)
    allowed = torch.cat([torch.ones(7, 5, dtype=torch.bool), allowed], dim=1) if masked else allowed
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    torch.testing.assert_close(recorded[0], weights, atol=1e-6, rtol=1e-5)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_a_window_counts_what_is_seen_and_leaves_the_image_alone() -> None:
    padded = torch.tensor([[True, True, True, False, False, True, True, False]])
    assert windowed(padded, 3, 0).tolist() == [[False, False, True, False, False, True, True, False]]
    assert windowed(padded, 3, 2).tolist() == [[True, True, True, False, False, True, True, False]]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is on: .* set it to false"),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 4},
            "layer_types has chunked_attention: .* full_attention or",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0: give the number of tokens"),
        ("gemma2", {"sliding_window": None}, "sliding_window is None: give the number of tokens"),
        (
            "smollm3",
            {"sliding_window": 5, "layer_types": tiny.SLIDING},
            "use_sliding_window is false: make them agree",
        ),
        ("gemma", {}, r"is of type gemma: supported are .*gemma2.*; docs/extending.md says how to add a family"),
    ],
)
def test_what_cannot_be_run_correctly_is_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    language = PartConfig(config=tiny.language(model_type, **changes))
    with pytest.raises(ValueError, match=message):
        meta_model(ModelConfig(PartConfig(config=tiny.SIGLIP), language))


@pytest.mark.parametrize("name", [name for name in tiny.LLMS if name not in ("granite", "gemma2")])
@torch.no_grad()
def test_the_baseline_leaves_as_a_llava(name: str, tmp_path: Path) -> None:
    config = config_of(name, "concat", vocab_size=300)
    model = random_model(config, 0.0)
    huggingface.export_llava(config, dict(model.named_parameters()), tmp_path, BYTES, "resize")
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    tokens = tiny.batch(1, longest=20).tokens
    image = torch.full((1, NUM_VISUAL), llava.config.image_token_index)
    ids = torch.cat([tokens[:, :1], image, tokens[:, 1:]], dim=1)
    pixels = (IMAGES[:1].float() - model.pixel_mean) / model.pixel_std
    found = llava(input_ids=ids, pixel_values=pixels).logits[:, NUM_VISUAL:, :300]
    close(found, model.logits(model.language_forward(model.encode_images(IMAGES[:1]), tokens)))


@pytest.mark.parametrize(("name", "field"), [("granite", "embedding_multiplier=6.0"), ("gemma2", "softcapping=2.0")])
def test_what_a_llava_would_leave_out_is_refused(name: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no place for .*{field} of {name}: export it as hive"):
        huggingface.export_llava(config_of(name, "concat"), {}, tmp_path, BYTES, "resize")
    plain = {"embedding_multiplier": 1.0, "logits_scaling": 1.0} if name == "granite" else {}
    config = config_of(name, "concat", **(plain or {"final_logit_softcapping": None}))
    assert not huggingface.why_no_llava(config)


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_texts_beyond_a_longropes_first_frequencies_are_refused(fusion: str) -> None:
    model = meta_model(config_of("phi3-longrope", fusion))
    extent = {"joint_attention": 4, "concat": NUM_VISUAL, "deepstack": NUM_VISUAL, "q_former": 5}.get(fusion, 0)
    check_positions(model, 128 - extent)
    with pytest.raises(
        ValueError, match=f"reaches 129 positions .* change beyond 128: set data.max_tokens={128 - extent}"
    ):
        check_positions(model, 129 - extent)
    check_positions(meta_model(config_of("llama", fusion)), 4096)
    assert model.host.longest(model.language.config) == 128


@pytest.mark.parametrize("name", ["phi3-longrope", "gemma2"])
def test_the_planner_traces_what_depends_on_values(name: str) -> None:
    assert flops.count(meta_model(config_of(name, "joint_attention"))).total(1, 20, 19).forward > 1e6


def test_fewer_layers_of_a_directory_are_taken_if_they_are_of_its_kinds(tmp_path: Path) -> None:
    auto: Any = AutoModelForCausalLM
    auto.from_config(AutoConfig.for_model(**tiny.language("smollm3"))).save_pretrained(tmp_path)
    for rotated, is_same in (([1, 1, 1], True), ([0, 1, 1], False)):
        fields = tiny.language("smollm3", num_hidden_layers=3, no_rope_layers=rotated)
        config = ModelConfig(PartConfig(config=tiny.SIGLIP), PartConfig(str(tmp_path), fields), encoder_layer_ratio=0.5)
        with (
            nullcontext() if is_same else pytest.raises(ValueError, match=r"trained with no_rope_layers=\[1, 1, 1, 0\]")
        ):
            init_model(config, 0)
