"""Decoding with a cache writes what running every text anew would write, and looks at each picture once."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from hive_scale.model import build
from hive_scale.model.decode import Decoder, generate
from hive_scale.model.hive import Hive

PICTURES = torch.randint(0, 256, (2, 3, tiny.IMAGE, tiny.IMAGE), generator=torch.Generator().manual_seed(1)).byte()
PROMPTS = [[1, 5, 9, 11, 12, 40], [1, 7], [1, 30, 31, 32], [1]]
ABOUT: list[int | None] = [1, 0, None, 1]  # two texts share a picture, one has none
MODELS: list[Any] = [
    ("cross_attention", "llama", {}),
    ("cross_attention", "qwen3", {}),
    ("joint_attention", "llama", {}),
    ("joint_attention", "llama", {"positions": "line"}),
    ("concat", "llama", {}),
]


def model(fusion: str, llm: str = "llama", **changes: Any) -> Hive:
    return tiny.sighted(build.assemble(tiny.model_config(fusion, llm, **changes), seed=3).eval(), 4)


@torch.no_grad()
def anew(hive: Hive, text: list[int], about: int | None) -> Tensor:
    """Logits of the token after `text`, by the forward that training uses, on this one text alone."""
    visual = hive.see(PICTURES[[about or 0]])
    has_image = None if about is not None else torch.tensor([False])
    return hive.logits(hive.read(visual, torch.tensor([text]), has_image)[0, -1])


@pytest.mark.parametrize(("fusion", "llm", "changes"), MODELS)
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0, 1, 3]], ids=["some without a picture", "all with pictures"])
def test_cached_logits_are_those_of_the_whole_text(fusion: str, llm: str, changes: Any, chosen: list[int]) -> None:
    hive = model(fusion, llm, **changes)
    texts, about = [list(PROMPTS[i]) for i in chosen], [ABOUT[i] for i in chosen]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=8)
    has_image = torch.tensor([one is not None for one in about])
    decoder = Decoder(hive, PICTURES, torch.tensor([one or 0 for one in about]), has_image)
    with torch.no_grad():
        logits = decoder.begin(tokens, torch.tensor([len(text) for text in texts]), room=4)
        for step in range(4):
            expected = torch.stack([anew(hive, text, one) for text, one in zip(texts, about, strict=True)])
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
            following = torch.tensor([20 + step + row for row in range(len(texts))])
            for text, token in zip(texts, following.tolist(), strict=True):
                text.append(token)
            logits = decoder.go_on(following)
    blind = torch.stack([anew(hive, text, None) for text in texts])
    seeing = has_image
    assert (logits - blind)[seeing].abs().max() > 1e-2  # the pictures did matter


@pytest.mark.parametrize("fusion", ["cross_attention", "joint_attention", "concat"])
def test_greedy_text_ends_where_it_should(fusion: str) -> None:
    hive = model(fusion)
    expected = []
    for prompt, about in zip(PROMPTS, ABOUT, strict=True):
        text = list(prompt)
        for _ in range(6):
            text.append(int(anew(hive, text, about).argmax()))
        expected.append(text[len(prompt) :])
    assert generate(hive, PICTURES, ABOUT, PROMPTS, end_ids=-1, max_tokens=6) == expected
    eos = expected[0][2]
    cut = [ids[: ids.index(eos)] if eos in ids else ids for ids in expected]
    assert generate(hive, PICTURES, ABOUT, PROMPTS, end_ids=eos, max_tokens=6) == cut


def test_each_picture_is_seen_and_projected_once() -> None:
    hive = model("cross_attention")
    rows: list[int] = []
    layer = hive.fusion.layers[0]
    layer.k_proj.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    hive.projector[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    generate(hive, PICTURES, ABOUT, PROMPTS, end_ids=-1, max_tokens=5)
    assert rows == [2, 2]  # two pictures, whatever the number of texts and tokens
