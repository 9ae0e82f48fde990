"""HIVE in transformers' own terms computes what HIVE computes, whatever way it generates, and its images once.

Why: users open it with `from_pretrained`, `generate` and pipelines, and compare it with what training and our decoder
say. References: our decoder, the forward without a cache, transformers' LLaVA and the bare LLM.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_conversation import TOKENIZERS, fast
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from hive_scale import HiveConfig, HiveForConditionalGeneration, HiveProcessor, export
from hive_scale.config import DataConfig, ModelConfig, PartConfig
from hive_scale.data.conversation import prompt_with_slot
from hive_scale.data.tokenizer import Tokenizer
from hive_scale.export import huggingface
from hive_scale.export.huggingface import hive_processor
from hive_scale.model import build
from hive_scale.model.generate import generate
from hive_scale.model.hive import Hive
from hive_scale.model.transformers_api import CACHE

pytestmark = pytest.mark.contract
FUSIONS = ["cross_attention", "joint_attention", "concat"]
EACH = pytest.mark.parametrize(("fusion", "llm"), [(fusion, llm) for fusion in FUSIONS for llm in ("llama", "qwen2")])
EACH_FUSION = pytest.mark.parametrize("fusion", FUSIONS)
IMAGES = torch.randint(0, 256, (2, 3, tiny.IMAGE, tiny.IMAGE), generator=torch.Generator().manual_seed(1)).byte()
PROMPTS = [[1, 5, 9, 11, 12, 40], [1, 7], [1, 30, 31, 32], [1]]
ABOUT: list[int | None] = [1, 0, None, 1]  # two texts share an image, one has none
SLOTS = [1, 2, 1, 1]
IMAGE_ID = tiny.VOCABULARY  # no row of the LLM's embeddings
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 2, "max_new_tokens": 8}


@cache
def hive(fusion: str, llm: str = "llama") -> Hive:
    return tiny.sighted(build.init_model(tiny.model_config(fusion, llm), seed=3).eval(), 4)


@cache
def wrapped(fusion: str, llm: str = "llama") -> HiveForConditionalGeneration:
    config = HiveConfig(model=asdict(tiny.model_config(fusion, llm)), image_token_id=IMAGE_ID)
    made = HiveForConditionalGeneration(config).eval()
    made.model.load_state_dict(hive(fusion, llm).state_dict())
    return made


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Token ids padded on the left, as transformers' generation wants them."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def inputs() -> dict[str, Tensor]:
    about = [(row, slot, one is not None) for row, slot, one in zip(PROMPTS, SLOTS, ABOUT, strict=True)]
    rows = [[*row[:slot], *[IMAGE_ID] * has, *row[slot:]] for row, slot, has in about]
    return padded(rows) | {"pixel_values": IMAGES, "image_index": torch.tensor([one or 0 for one in ABOUT])}


def about_one(*prompt: int) -> dict[str, Tensor]:
    return padded([[1, IMAGE_ID, *prompt]]) | {"pixel_values": IMAGES[:1]}


def new(made: Tensor, given: dict[str, Tensor], end: int = 2) -> list[list[int]]:
    rows = made[:, given["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


@EACH
def test_greedy_tokens_are_those_of_the_decoder(fusion: str, llm: str) -> None:
    """Also for texts that share an image, that have none, and whose image comes later."""
    given, model = inputs(), wrapped(fusion, llm)
    expected = generate(hive(fusion, llm), IMAGES, ABOUT, PROMPTS, 2, 8, SLOTS)
    made = model.generate(**given, **GREEDY)
    assert new(made, given) == expected
    assert torch.equal(model.generate(**given, **GREEDY, use_cache=False), made)
    blind = [row for row, one in zip(PROMPTS, ABOUT, strict=True) if one is not None]
    there = [row for row, one in zip(expected, ABOUT, strict=True) if one is not None]
    assert new(model.generate(**padded(blind), **GREEDY), padded(blind)) != there, "the images did not matter"


@pytest.mark.parametrize("llm", ["llama", "qwen2"])
@torch.no_grad()
def test_the_baseline_equals_the_llava_that_transformers_runs(llm: str, tmp_path: Path) -> None:
    tokenizer = fast(None)
    language = tiny.language(llm, vocab_size=tokenizer.vocab_size)
    config = ModelConfig(PartConfig(config=tiny.SIGLIP), PartConfig(config=language), fusion="concat")
    ours = tiny.sighted(build.init_model(config, seed=5).eval(), 3)
    huggingface.export_llava(config, dict(ours.named_parameters()), tmp_path, tokenizer.stock, "resize")
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    image_id, num_visual = llava.config.image_token_index, ours.features_shape[1]
    model = HiveForConditionalGeneration(HiveConfig(model=asdict(config), image_token_id=image_id)).eval()
    model.model.load_state_dict(ours.state_dict())
    pixels = (IMAGES.float() - ours.pixel_mean) / ours.pixel_std  # normalised, as by an image processor
    texts = [[1, image_id, 20, 21], [1, 9, image_id, 30]]
    given = padded(texts)
    wide = padded(
        [[one for token in row for one in [token] * (num_visual if token == image_id else 1)] for row in texts]
    )
    theirs = llava(**wide, pixel_values=pixels).logits
    found = model(**given, pixel_values=pixels).logits
    torch.testing.assert_close(found[:, -1, :image_id], theirs[:, -1, :image_id], atol=2e-5, rtol=1e-5)
    # behind the image, columns are the same tokens; at its place, the last visual token is meant
    torch.testing.assert_close(found[0, 1:, :image_id], theirs[0, -3:, :image_id], atol=2e-5, rtol=1e-5)
    settings = GREEDY | {"suppress_tokens": [image_id]}
    assert new(model.generate(**given, pixel_values=pixels, **settings), given) == new(
        llava.generate(**wide, pixel_values=pixels, **settings), wide
    )


@pytest.mark.parametrize("llm", ["llama", "qwen2"])
def test_behind_a_closed_gate_a_text_is_the_bare_llms(llm: str) -> None:
    config = tiny.model_config("cross_attention", llm)
    ours = build.init_model(config, seed=3).eval()
    model = HiveForConditionalGeneration(HiveConfig(model=asdict(config), image_token_id=IMAGE_ID)).eval()
    model.model.load_state_dict(ours.state_dict())
    bare: Any = AutoModelForCausalLM.from_config(build.language_config(config.language), attn_implementation="sdpa")
    bare.load_state_dict(ours.language.state_dict())
    given = padded(PROMPTS)
    for settings in (GREEDY, GREEDY | {"num_beams": 3}, GREEDY | {"repetition_penalty": 1.3}):
        expected = bare.eval().generate(**given, **settings)
        assert torch.equal(model.generate(**given, **settings), expected)
    seen = padded([[1, IMAGE_ID, 5], [1, IMAGE_ID, 7]])
    text = padded([[1, 5], [1, 7]])  # the gate is closed for images, too
    assert new(model.generate(**seen, pixel_values=IMAGES, **GREEDY), seen) == new(
        bare.generate(**text, **GREEDY), text
    )


@EACH
def test_beams_and_samples_are_those_without_a_cache(fusion: str, llm: str) -> None:
    model, given = wrapped(fusion, llm), inputs()
    for settings in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        made = []
        for cached in (True, False):
            torch.manual_seed(0)
            made.append(model.generate(**given, **GREEDY | settings, use_cache=cached))
        assert torch.equal(*made)
        assert len(made[0]) == 2 * len(PROMPTS)


@EACH_FUSION
def test_each_image_is_encoded_once_for_all_prompts_and_beams(fusion: str) -> None:
    model, rows = wrapped(fusion), list[tuple[str, int]]()
    watched: list[tuple[str, Any]] = [("encoder", model.model.family.blocks(model.model.vision)[0])]
    watched += [("projector", model.model.projector[0])]
    fused: Any = model.model.fusion.layers
    watched += [("keys", fused[0].k_proj)] if len(fused) else []

    def hook(name: str) -> Callable[..., None]:
        return lambda _, given, __: rows.append((name, len(given[0])))

    hooks = [module.register_forward_hook(hook(name)) for name, module in watched]
    model.generate(**inputs(), **GREEDY | {"num_beams": 3})
    for one in hooks:
        one.remove()
    assert rows == [(name, len(IMAGES)) for name, _ in watched]


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class AfterThree(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length + 3)


@EACH
def test_tokens_are_streamed_and_stopped(fusion: str, llm: str) -> None:
    model, given, heard = wrapped(fusion, llm), about_one(5, 9), Heard()
    made = model.generate(**given, **GREEDY, streamer=heard)
    assert heard.tokens == made[0].tolist()
    assert heard.ended
    stop = StoppingCriteriaList([AfterThree(given["input_ids"].shape[1])])
    stopped = model.generate(**given, **GREEDY, stopping_criteria=stop)
    assert torch.equal(stopped, made[:, : stopped.shape[1]])
    assert stopped.shape[1] == given["input_ids"].shape[1] + 3


@EACH
def test_assisted_decoding_writes_the_same(fusion: str, llm: str) -> None:
    """Drafts that are right, of the model itself; wrong ones, of another; and those of the prompt's own words."""
    model, given = wrapped(fusion, llm), about_one(5, 9, 5, 9, 5)
    expected = model.generate(**given, **GREEDY)
    other = HiveForConditionalGeneration(model.config).eval()
    for settings in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}, {"assistant_model": other}):
        assert torch.equal(model.generate(**given, **GREEDY, **settings), expected)
    with pytest.raises(ValueError, match="LlamaForCausalLM, which cannot read the prompt's <image>"):
        model.generate(**given, **GREEDY, assistant_model=wrapped("concat").model.language)


@EACH
@torch.no_grad()
def test_a_cache_goes_on_forgets_repeats_and_selects(fusion: str, llm: str) -> None:
    model, given = wrapped(fusion, llm), inputs()

    def whole(rows: list[int], tail: list[list[int]]) -> Tensor:
        """The last logits of the texts `rows`, each with its tail, without a cache."""
        ids = torch.cat([given["input_ids"][rows], torch.tensor(tail)], dim=1)
        mask = torch.cat([given["attention_mask"][rows], torch.ones(len(rows), len(tail[0]), dtype=torch.long)], dim=1)
        index = given["image_index"][rows]
        made: Tensor = model(ids, mask, IMAGES if any(ABOUT[i] is not None for i in rows) else None, index).logits
        return made[:, -1]

    def go_on(past: Any, tail: list[list[int]]) -> Any:
        return model(torch.tensor(tail), **{CACHE: past})

    def close(found: Any, rows: list[int], tail: list[list[int]]) -> None:
        torch.testing.assert_close(found.logits[:, -1], whole(rows, tail), atol=2e-4, rtol=1e-4)

    every = list(range(4))
    past: Any = model(**given)[CACHE]
    length = past.get_seq_length()
    assert length == given["input_ids"].shape[1]
    close(go_on(past, [[20, 21, 22]] * 4), every, [[20, 21, 22]] * 4)  # several tokens at once
    past.crop(-2)
    assert past.get_seq_length() == length + 1
    close(go_on(past, [[30]] * 4), every, [[20, 30]] * 4)
    past.reorder_cache(torch.tensor([3, 2, 1, 0]))
    close(go_on(past, [[31], [32], [33], [34]]), [3, 2, 1, 0], [[20, 30, token] for token in (31, 32, 33, 34)])
    past.batch_select_indices(torch.tensor([0, 2]))
    past.batch_repeat_interleave(2)
    tail = [[20, 30, 31, 40], [20, 30, 31, 41], [20, 30, 33, 40], [20, 30, 33, 41]]
    close(go_on(past, [[40], [41], [40], [41]]), [3, 3, 1, 1], tail)
    with pytest.raises(ValueError, match="a text would be empty"):
        past.crop(-6)


@torch.no_grad()
def test_a_cache_forgets_words_of_the_prompt() -> None:
    for fusion in FUSIONS:
        model = wrapped(fusion)
        past: Any = model(**about_one(5, 9, 11))[CACHE]
        past.crop(-2)
        found = model(torch.tensor([[30]]), **{CACHE: past}).logits[:, -1]
        torch.testing.assert_close(found, model(**about_one(5, 30)).logits[:, -1], atol=2e-4, rtol=1e-4)


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, given = wrapped("cross_attention"), about_one(5)
    first = model.generate(**given, **GREEDY | {"eos_token_id": None}, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[6, 7]])], dim=1)
    again = model.generate(longer, **{CACHE: first[CACHE]}, **GREEDY)
    assert torch.equal(again, model.generate(longer, pixel_values=IMAGES[:1], **GREEDY))


@EACH_FUSION
@torch.no_grad()
def test_the_loss_of_labels_is_that_of_training(fusion: str) -> None:
    batch = tiny.batch(3)
    tokens = batch.tokens
    is_target = torch.zeros_like(tokens).flatten()
    is_target[batch.target_rows + 1] = 1  # the place of a target is behind the row that predicts it
    is_target = is_target.view_as(tokens).bool()
    ids = torch.cat([tokens[:, :1], torch.full((3, 1), IMAGE_ID), tokens[:, 1:]], dim=1)
    labels = torch.cat([torch.full((3, 2), -100), torch.where(is_target, tokens, -100)[:, 1:]], dim=1)
    found = wrapped(fusion)(ids, pixel_values=batch.pixels, labels=labels).loss
    expected = hive(fusion)(**batch.inputs()) / len(batch.target_ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@EACH
def test_a_model_comes_back_as_it_was_saved(fusion: str, llm: str, tmp_path: Path) -> None:
    model, given = wrapped(fusion, llm), inputs()
    model.save_pretrained(tmp_path)
    names = {name for name, _ in model.model.named_parameters()}
    assert load_file(tmp_path / "model.safetensors").keys() == names, "files have the names of Hive"
    for auto in (AutoModel, AutoModelForImageTextToText, HiveForConditionalGeneration):
        again: Any = auto.from_pretrained(tmp_path)
        assert type(again) is HiveForConditionalGeneration
    assert type(AutoConfig.from_pretrained(tmp_path)) is HiveConfig
    for one, other in (
        (model.model.named_parameters, again.model.named_parameters),
        (model.model.named_buffers, again.model.named_buffers),
    ):
        mine, theirs = dict(one()), dict(other())
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(again.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    batch = tiny.batch()
    assert torch.equal(export.from_pretrained(tmp_path)(**batch.inputs()), model.model(**batch.inputs()))
    half: Any = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in half.model.buffers()} - {torch.int64} == {torch.float32}
    assert half.generate(**given, **GREEDY).shape[0] == len(PROMPTS)


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    wrapped("cross_attention").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({name: one for name, one in tensors.items() if "gate" not in name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights.*gate"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "3 texts hold <image> and there are no pixel_values"),
        ({"image_index": torch.tensor([0, 2, 0, 0])}, "beyond the 2 images"),
        ({"image_index": None}, "3 texts hold <image> and there are 2 images"),
        ({"input_ids": torch.tensor([[1, 5]] * 4), "attention_mask": None}, "no text holds <image>"),
        ({"input_ids": torch.tensor([[1, 97, 97]] * 4), "attention_mask": None}, "more than once"),
        ({"input_ids": torch.tensor([[97]] * 4), "attention_mask": None}, "begin it with the start token"),
        ({"cache_implementation": "static"}, "cache_implementation=static is not for a HIVE"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size=2 is not for a HIVE"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped("cross_attention").generate(**inputs() | GREEDY | change)


def test_another_cache_and_a_config_without_the_token_are_refused() -> None:
    model = wrapped("cross_attention")
    other = StaticCache(config=model.config.get_text_config(), max_cache_len=9)
    with pytest.raises(ValueError, match="StaticCache is not for a HIVE"):
        model(**about_one(5), **{CACHE: other})
    old = HiveForConditionalGeneration(HiveConfig(model=model.config.model))
    with pytest.raises(ValueError, match=r"model.config.image_token_id = processor.image_token_id"):
        old(**about_one(5))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("position", ["user", "start"])
def test_the_processor_asks_as_training_did(name: str, position: Any, tmp_path: Path) -> None:
    """And the tokenizer that is saved with it, read by ours, asks and ends in the same way."""
    tokenizer = TOKENIZERS[name]
    config = ModelConfig(PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(vocab_size=700)))
    data = DataConfig(format="conversation", image_position=position)
    turns = [{"role": "user", "content": "what is in the image ?"}]
    if position == "start" and not tokenizer.template.special.match(tokenizer.template.render(turns)):
        with pytest.raises(ValueError, match=r"data\.image_position=user"):  # no start token for the image to follow
            hive_processor(config, data, tokenizer.stock)
        return
    made, generation = hive_processor(config, data, tokenizer.stock)
    made.save_pretrained(tmp_path)
    AutoConfig.for_model("hive").save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is HiveProcessor
    assert processor.format == "conversation"
    image = torch.zeros(3, tiny.IMAGE, tiny.IMAGE, dtype=torch.uint8)
    ids, slot = prompt_with_slot(turns, tokenizer, position)
    expected = [*ids[:slot], processor.image_token_id, *ids[slot:]]
    content = [{"type": "image", "image": image}, {"type": "text", "text": turns[0]["content"]}]
    asked = [{"role": "user", "content": content}]
    chat = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    for one in (processor(images=image, text=turns[0]["content"]), chat):
        assert one["input_ids"].tolist() == [expected]
        assert one["pixel_values"].shape == (1, 3, tiny.IMAGE, tiny.IMAGE)
    blind = prompt_with_slot(turns, tokenizer, None)[0]
    assert processor(text=turns[0]["content"])["input_ids"].tolist() == [blind]
    again = Tokenizer(processor.tokenizer)
    assert prompt_with_slot(turns, again, position) == (ids, slot)
    assert again.end_ids == tokenizer.end_ids == generation.eos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_processor_begins_captions_as_training_did(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]
    config = ModelConfig(PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(vocab_size=700)))
    made, generation = hive_processor(config, DataConfig(), tokenizer.stock)
    made.save_pretrained(tmp_path)
    AutoConfig.for_model("hive").save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = torch.zeros(3, tiny.IMAGE, tiny.IMAGE, dtype=torch.uint8)
    start, *rest = tokenizer.encode("a horse", 99)[:-1]
    expected = [start, processor.image_token_id, *rest]
    asked = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a horse"}]}]
    chat = processor.apply_chat_template(asked, tokenize=True, return_dict=True, add_generation_prompt=True)
    for one in (processor(images=image, text="a horse"), processor(images=image, text="<image>a horse"), chat):
        assert one["input_ids"].tolist() == [expected]
    several = processor(images=image, text=["a horse", ""])  # one image for all
    assert several["input_ids"].tolist()[1][-2:] == [start, processor.image_token_id]
    assert several["attention_mask"].sum(1).tolist() == [len(expected), 2]
    assert len(several["pixel_values"]) == 1
    mixed = processor(images=image, text=["a horse", "<image>a horse"])  # one of two is about it
    assert [processor.image_token_id in row for row in mixed["input_ids"].tolist()] == [False, True]
    assert processor(text="a horse")["input_ids"].tolist() == [[start, *rest]]
    with pytest.raises(ValueError, match="2 texts are about an image and 3 images are given"):
        processor(images=[image] * 3, text=["<image>", "<image>"])
    with pytest.raises(ValueError, match="1 texts are about an image and 0 images are given"):
        processor(text="<image>a horse")
    assert Tokenizer(processor.tokenizer).end_ids == tokenizer.end_ids == generation.eos_token_id
    with pytest.raises(ValueError, match="format=video"):
        HiveProcessor(made.image_processor, tokenizer.stock, format="video")


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, hive_scale; assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert set(hive_scale.__all__) <= set(dir(hive_scale))\n"
        "from hive_scale import HiveConfig; from transformers import AutoConfig\n"
        "assert type(AutoConfig.for_model('hive')) is HiveConfig\n"
        "try: hive_scale.Hiv\n"
        "except AttributeError: sys.exit(0)\n"
        "sys.exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
