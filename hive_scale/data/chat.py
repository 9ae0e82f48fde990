"""Conversations as a chat model reads them: its own template around the turns, its answers alone as targets."""

from __future__ import annotations

import re

from torch import Tensor

from hive_scale.batch import Sample
from hive_scale.data.tokenizer import Tokenizer
from hive_scale.data.turns import Turns


def chat_sample(key: str, pixels: Tensor | None, turns: Turns, tokenizer: Tokenizer, max_tokens: int) -> Sample:
    """The conversation `turns` about a picture: the targets are the assistant's words and the end of its turns.

    Raises ValueError if the first `max_tokens` tokens, which are kept, hold no word of an answer.
    """
    tokens, is_target = tokenizer.encode_parts(_parts(turns, tokenizer))
    if not any(is_target[:max_tokens]):
        raise ValueError(f"the first answer begins after data.max_tokens={max_tokens}")
    return Sample(key, pixels, tokens[:max_tokens], is_target[:max_tokens])


def prompt(turns: Turns, tokenizer: Tokenizer) -> list[int]:
    """Tokens of `turns`, the last of which is the user's, up to where the assistant's answer begins."""
    return tokenizer.encode_parts(_parts([*turns, {"role": "assistant", "content": "?"}], tokenizer)[:1])[0]


def _parts(turns: Turns, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The conversation's text in parts, each with whether it is a target.

    Which text is an answer is found by rendering the template around marks in the answers' place: some templates
    drop, trim or add to earlier turns, so that the text of fewer turns need not begin the text of more.
    """
    for turn in turns:
        if special := tokenizer.special_in(turn["content"]):
            raise ValueError(f"a turn of the conversation holds the tokenizer's special token {special}")
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    marks = [f"\ue000{i}\ue001" for i in range(len(answers))]
    left = iter(marks)
    marked = [turn | {"content": next(left)} if turn["role"] == "assistant" else turn for turn in turns]
    between = re.split("\ue000\\d+\ue001", _render(marked, tokenizer))
    if len(between) != len(answers) + 1:
        raise ValueError("the tokenizer's chat template does not show each answer once")
    parts, before = [], between[0]
    for answer, after in zip(answers, between[1:], strict=True):
        end = tokenizer.end_of_turn(after)
        asked = before.rstrip(" ")  # in most vocabularies a space is a piece of the word behind it
        parts += [(asked, False), (before[len(asked) :] + answer + after[:end], True)]
        before = after[end:]
    return [*parts, (before, False)]


def _render(turns: Turns, tokenizer: Tokenizer) -> str:
    """`turns` in the tokenizer's template; one that knows no system role gets its text before the first question."""
    text = tokenizer.render(turns)
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    if text is None or not all(content in text for content in system):
        first, *rest = turns[len(system) :]
        content = "\n\n".join([*system, first["content"]])
        text = tokenizer.render([first | {"content": content}, *rest])
    if text is None:
        raise ValueError("the tokenizer's chat template refuses a conversation of user and assistant")
    return text
