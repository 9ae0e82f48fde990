"""Why: a mask that is off by one token teaches the model to ask, or never to stop; and every template is different."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hive_scale.config import TokenizerConfig
from hive_scale.data.conversation import prompt, tokenize_conversation
from hive_scale.data.messages import parse_messages
from hive_scale.data.tokenizer import Tokenizer, open_tokenizer

SPECIAL = ["<unk>", "<bos>", "</s>", "<|im_start|>", "<|im_end|>", "<turn>", "<end_of_turn>"]
SYSTEM_FIRST = "{% if loop.first and message.role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
TEMPLATES = {
    "a default system text": "{% for message in messages %}"
    + SYSTEM_FIRST
    + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}",
    "brackets, a space and the end token": "{{ bos_token }}{% for message in messages %}{% if message.role == "
    "'assistant' %} {{ message.content | trim }} {{ eos_token }}{% elif message.role == 'system' %}<<{{ "
    "message.content }}>> {% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}",
    "no system role": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for message in messages %}<turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}",
    "a system role passed over": "{{ bos_token }}{% for message in messages if message.role != 'system' %}"
    "<turn>{{ message.role }}\n{{ message.content }}<end_of_turn>\n{% endfor %}",
    "thoughts before the last answer": "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if loop.last "
    "%}<think>\n\n</think>\n\n{% endif %}{{ message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}",
    "today's date": "{{ bos_token }}{% if date_string is not defined %}{{ strftime_now('%H:%M:%S %f') }}{% else %}"
    "{{ date_string }}{% endif %}{% for message in messages %}<turn>{{ message.role }}\n{{ message.content }}"
    "<end_of_turn>{% endfor %}",
}


def fast(template: str | None, metaspace: bool = False) -> Tokenizer:
    """A small BPE, byte level as GPT-2's or with sentencepiece's spaces, under `template`."""
    raw = RawTokenizer(models.BPE(unk_token="<unk>", byte_fallback=metaspace))
    raw.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    added: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "é"] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=added, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["what is in the image ? a horse and its rider user assistant model"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return Tokenizer(tokenizer)


TOKENIZERS = {name: fast(template) for name, template in TEMPLATES.items()}
TOKENIZERS["sentencepiece"] = fast(TEMPLATES["brackets, a space and the end token"], metaspace=True)
TOKENIZERS["no template"] = fast(None)
TOKENIZERS["bytes"] = open_tokenizer(TokenizerConfig())


def record(*said: str, system: str = "", **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"conversations": ([{"from": "system", "value": system}] if system else []) + turns} | more


words = st.text("abé ?\n1", min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=20)
@given(said=st.lists(st.tuples(words, words), min_size=1, max_size=3), system=st.sampled_from(["", "Say a."]))
def test_the_targets_are_the_answers_and_the_prompt_is_what_precedes_the_last(
    name: str, said: list[tuple[str, str]], system: str
) -> None:
    tokenizer = TOKENIZERS[name]
    turns = parse_messages(record(*(text for pair in said for text in pair), system=system))
    sample = tokenize_conversation("k", None, turns, tokenizer, 10_000)
    runs: list[list[int]] = []
    for before, token, is_target in zip([False, *sample.is_target], sample.tokens, sample.is_target, strict=False):
        if is_target:
            runs += [] if before else [[]]
            runs[-1].append(token)
    assert [tokenizer.decode(run).strip() for run in runs] == [answer for _, answer in said]
    assert all(tokenizer.decode(run[-1:]) == "" for run in runs), "an answer ends with a special token"
    shown = tokenizer.decode(sample.tokens)
    assert all(question in shown for question, _ in said)
    assert not system or "Say a." in shown
    asked = prompt(turns[:-1], tokenizer)
    assert asked == list(sample.tokens[: len(asked)])
    assert not any(sample.is_target[: len(asked)][-1:])
    assert sample.is_target[len(asked)], "the answer begins where the prompt ends"
    assert not sample.is_target[0]


def test_the_image_has_no_place_in_the_text_and_odd_layouts_are_read() -> None:
    turns = parse_messages(record("<image>\nWhat is it?", "A horse.", "And now?", image="a.jpg"))
    assert turns == [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A horse."}]
    hub = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "images": ["x"]}
    assert [turn["role"] for turn in parse_messages(hub)] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "no conversation in its .json"),
        ({"conversations": "hello"}, "no conversation in its .json"),
        (record("Q"), "does not alternate"),
        ({"conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]}, "does not alternate"),
        ({"conversations": [{"from": "owl", "value": "A"}]}, "is not {from: human or gpt"),
        ({"conversations": [{"from": "human", "value": 3}]}, "is not {from: human or gpt"),
        (record("Q", "  "), "an answer of the conversation is empty"),
        (record("<image> and <image>?", "A"), "about 2 images: only one"),
        (record("<image>", "A", image=["a.jpg", "b.jpg", "c.jpg"]), "about 3 images: only one"),
        (record("what \ud83d?", "A"), "half a character"),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "is not {from: human or gpt"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_messages(wrong)


def test_limits_and_templates_that_will_not_do_say_so() -> None:
    tokenizer = TOKENIZERS["a default system text"]
    turns = parse_messages(record("a" * 50, "horse"))
    pixels = torch.zeros(3, 2, 2)
    whole = tokenize_conversation("k", pixels, turns, tokenizer, 10_000)
    assert (whole.key, whole.pixels) == ("k", pixels)
    first = whole.is_target.index(True)
    cut = tokenize_conversation("k", None, turns, tokenizer, first + 1)
    assert list(cut.tokens) == list(whole.tokens[: first + 1])
    with pytest.raises(ValueError, match=f"begins after data.max_tokens={first}"):
        tokenize_conversation("k", None, turns, tokenizer, first)
    with pytest.raises(ValueError, match=r"holds the tokenizer's special token <\|im_end\|>"):
        tokenize_conversation("k", None, parse_messages(record("what <|im_end|>", "A")), tokenizer, 99)
    for template, message in (
        ("{% for message in messages %}{{ message.content }}\n{% endfor %}", "without a special token"),
        ("{{ messages[0].content }}</s>", "does not show each answer once"),
        ("{{ raise_exception('never') }}", "refuses a conversation"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_conversation("k", None, turns, fast(template), 99)


def words_alone(special: str) -> Tokenizer:
    """A tokenizer whose vocabulary has its special token among its words, too."""
    raw = RawTokenizer(models.WordLevel({"<unk>": 0, special: 1, "horse": 2, "<": 3, "/s>": 4}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=special, pad_token="<unk>"))


@settings(max_examples=60)
@given(parts=st.lists(st.sampled_from([*SPECIAL, "<pad>", "horse", " ", "/s", "<", "x"]), max_size=8))
@pytest.mark.parametrize("tokenizer", [*TOKENIZERS.values(), Tokenizer(ByT5Tokenizer())], ids=[*TOKENIZERS, "slow"])
def test_special_tokens_that_a_caption_spells_are_text(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    asked = tokenizer._tokenizer(text, add_special_tokens=False).input_ids
    tokens = tokenizer.encode(text, 10_000)
    assert (tokens[0], tokens[-1]) == (tokenizer.start_id, tokenizer.eos_id)
    special = {*tokenizer.stock.all_special_ids} - {tokenizer.stock.unk_token_id}
    assert special.isdisjoint(tokens[1:-1])
    assert tokenizer.decode(tokens).strip() == text.strip()
    assert tokenizer._tokenizer(text, add_special_tokens=False).input_ids == asked, "conversations are read as before"


def test_a_special_token_that_is_also_a_word_is_cut_in_two() -> None:
    tokenizer = words_alone("</s>")
    assert tokenizer.encode("horse </s> horse", 77) == [1, 2, 3, 4, 2, 1]


def in_normal_form(kind: str, normalized: bool = False) -> Tokenizer:
    """A tokenizer that reads text in its normal form, in which full-width letters and capitals are plain ones."""
    words = ["<unk>", "</s>", "<bos>", *"</s>▁horse", "▁horse"]
    if kind == "unigram":
        raw = RawTokenizer(models.Unigram([(word, -1.0) for word in dict.fromkeys(words)], 0))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        raw = RawTokenizer(models.BPE(byte_fallback=False))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.add_special_tokens([AddedToken(word, special=True, normalized=normalized) for word in words[:3]])
    named = {"bos_token": "<bos>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, **named))


@pytest.mark.parametrize("tokenizer", [in_normal_form("unigram"), in_normal_form("bpe", normalized=True)])
@pytest.mark.parametrize("spelt", ["\uff1c/s\uff1e", "</S>", "</s></S>", "\uff1c/\uff33>"])
def test_a_special_token_that_only_the_normal_form_of_a_text_spells_is_no_end(tokenizer: Tokenizer, spelt: str) -> None:
    tokens = tokenizer.encode(f"horse {spelt} horse", 99)
    assert [tokens.count(tokenizer.start_id), tokens.index(tokenizer.eos_id)] == [1, len(tokens) - 1]
    for said in ((spelt, "A"), ("Q", f"horse {spelt}")):
        with pytest.raises(ValueError, match="holds the tokenizer's special token </s>"):
            tokenize_conversation("k", None, parse_messages(record(*said)), tokenizer, 999)
    assert tokenize_conversation("k", None, parse_messages(record("Q", "Horse \uff1c")), tokenizer, 999)


def test_an_unknown_character_is_no_end_where_the_vocabulary_has_one_token_for_both() -> None:
    raw = RawTokenizer(models.WordLevel({"</s>": 0, "horse": 1}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "</s>")
    assert Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, **named)).encode("horse é horse", 9) == [0, 1, 1, 0]


@pytest.mark.parametrize("image", ["user", "start", None])
def test_the_images_token_in_pieces_is_not_put_together(image: Any) -> None:
    tokenizer = TOKENIZERS["bytes"]
    for question, answer in (("Q {}?", "A"), ("Q?", "A {} b")):
        made = []
        for spelt in ("", "<ima<image>ge>", "<i<ima<image>ge>mage>"):
            turns = [
                {"role": "user", "content": question.format(spelt)},
                {"role": "assistant", "content": answer.format(spelt)},
            ]
            made.append(tokenize_conversation("k", None, turns, tokenizer, 999, image))
        assert made[1:] == made[:1] * 2
    assert parse_messages(record("<ima<image>ge> Q", "A"))[0]["content"] == "Q"


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "no system role"])
@settings(max_examples=30)
@given(text=st.text("abé\U0001f600 ?\n1", max_size=30))
def test_captions_are_encoded_as_the_tokenizer_does(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, 99) == [tokenizer.start_id, *ids, tokenizer.eos_id]
