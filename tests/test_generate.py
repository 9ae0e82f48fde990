"""Decoding with a KV cache writes the same text as recomputing every token, and encodes each image once."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hive_scale.model import build
from hive_scale.model.generate import Decoder, generate
from hive_scale.model.hive import Hive
from hive_scale.registry import FUSION_NAMES

IMAGES = torch.randint(0, 256, (2, 3, tiny.IMAGE, tiny.IMAGE), generator=torch.Generator().manual_seed(1)).byte()
PROMPTS = [[1, 5, 9, 11, 12, 40], [1, 7], [1, 30, 31, 32], [1]]
ABOUT: list[int | None] = [1, 0, None, 1]  # two texts share an image, one has none
MODELS: list[Any] = [
    ("cross_attention", "llama", {}),
    ("cross_attention", "qwen3", {}),
    ("joint_attention", "llama", {}),
    ("joint_attention", "llama", {"positions": "line"}),
    ("concat", "llama", {}),
    ("deepstack", "llama", {}),
    ("gated_cross_attention", "llama", {}),
    ("q_former", "llama", {"num_query_tokens": 5}),
]


def model(fusion: str, llm: str = "llama", **changes: Any) -> Hive:
    return tiny.sighted(build.init_model(tiny.model_config(fusion, llm, **changes), seed=3).eval(), 4)


@torch.no_grad()
def anew(hive: Hive, text: list[int], about: int | None) -> Tensor:
    """Logits of the token after `text`, by the forward that training uses, on this one text alone."""
    visual = hive.encode_images(IMAGES[[about or 0]])
    has_image = None if about is not None else torch.tensor([False])
    return hive.logits(hive.language_forward(visual, torch.tensor([text]), has_image)[0, -1])


@pytest.mark.parametrize(("fusion", "llm", "changes"), MODELS)
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0, 1, 3]], ids=["some without an image", "all with images"])
def test_cached_logits_are_those_of_the_whole_text(fusion: str, llm: str, changes: Any, chosen: list[int]) -> None:
    hive = model(fusion, llm, **changes)
    texts, about = [list(PROMPTS[i]) for i in chosen], [ABOUT[i] for i in chosen]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=8)
    has_image = torch.tensor([one is not None for one in about])
    decoder = Decoder(hive, IMAGES, torch.tensor([one or 0 for one in about]), has_image)
    with torch.no_grad():
        logits = decoder.prefill(tokens, torch.tensor([len(text) for text in texts]), room=4)
        for step in range(4):
            expected = torch.stack([anew(hive, text, one) for text, one in zip(texts, about, strict=True)])
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
            following = torch.tensor([20 + step + row for row in range(len(texts))])
            for text, token in zip(texts, following.tolist(), strict=True):
                text.append(token)
            logits = decoder.decode_step(following)
    blind = torch.stack([anew(hive, text, None) for text in texts])
    seeing = has_image
    assert (logits - blind)[seeing].abs().max() > 1e-2  # the images did matter


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_greedy_text_ends_where_it_should(fusion: str) -> None:
    hive = model(fusion)
    expected = []
    for prompt, about in zip(PROMPTS, ABOUT, strict=True):
        text = list(prompt)
        for _ in range(6):
            text.append(int(anew(hive, text, about).argmax()))
        expected.append(text[len(prompt) :])
    assert generate(hive, IMAGES, ABOUT, PROMPTS, end_ids=-1, max_tokens=6) == expected
    eos = expected[0][2]
    cut = [ids[: ids.index(eos)] if eos in ids else ids for ids in expected]
    assert generate(hive, IMAGES, ABOUT, PROMPTS, end_ids=eos, max_tokens=6) == cut


def test_each_image_is_seen_and_projected_once() -> None:
    hive = model("cross_attention")
    rows: list[int] = []
    layer = hive.fusion.layers[0]
    layer.k_proj.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    hive.projector[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    generate(hive, IMAGES, ABOUT, PROMPTS, end_ids=-1, max_tokens=5)
    assert rows == [2, 2]  # two images, whatever the number of texts and tokens


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_keys_and_values_stay_where_they_are(fusion: str) -> None:
    hive = model(fusion)
    about = torch.tensor([one or 0 for one in ABOUT])
    decoder = Decoder(hive, IMAGES, about, torch.tensor([one is not None for one in ABOUT]))
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in PROMPTS], batch_first=True)
    places = set()
    with torch.inference_mode():
        logits = decoder.prefill(tokens, torch.tensor([len(text) for text in PROMPTS]), room=5)
        for _ in range(5):
            logits = decoder.decode_step(logits.argmax(-1))
            layers: list[Any] = decoder.cache.layers
            places.add(tuple(one.data_ptr() for layer in layers for one in (layer.keys, layer.values)))
    assert len(places) == 1
    with pytest.raises(ValueError, match="room for 5 tokens"):
        decoder.decode_step(logits.argmax(-1))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: a number of a tensor that Python asks for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_every_few_tokens() -> None:
    hive, waited = model("cross_attention"), {}
    for number in (8, 16, 32, 64):
        with Waits() as waits:
            generate(hive, IMAGES, ABOUT, PROMPTS, end_ids=-1, max_tokens=number)
        waited[number] = waits.count
    assert [waited[number] - waited[8] for number in (16, 32, 64)] == [1, 3, 7], "one in eight"


def test_no_text_is_run_far_beyond_its_end() -> None:
    hive, steps = model("cross_attention"), list[int]()
    hive.language.lm_head.register_forward_hook(lambda *_: steps.append(1))
    first = generate(hive, IMAGES, ABOUT, PROMPTS, end_ids=-1, max_tokens=1)
    steps.clear()
    ends = {ids[0] for ids in first}
    assert generate(hive, IMAGES, ABOUT, PROMPTS, end_ids=ends, max_tokens=64) == [[]] * 4
    assert len(steps) == 8


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_under_autocast_too(fusion: str) -> None:
    hive, text = model(fusion), list(PROMPTS[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder = Decoder(hive, IMAGES, torch.tensor([1]), torch.tensor([True]))
        logits = decoder.prefill(torch.tensor([text]), torch.tensor([len(text)]), room=3)
        for token in (20, 21, 22):
            text.append(token)
            logits = decoder.decode_step(torch.tensor([token]))
        expected = anew(hive, text, 1)
        assert decoder.cache.layers[0].keys.dtype == torch.bfloat16
    torch.testing.assert_close(logits[0], expected, atol=0.05 * float(expected.abs().max()), rtol=0)
