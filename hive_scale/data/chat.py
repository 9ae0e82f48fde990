"""Conversations as a chat model reads them: its own template around the turns, its answers alone as targets."""

from __future__ import annotations

from torch import Tensor

from hive_scale.batch import Sample
from hive_scale.chat_template import IMAGE, Turns, without_image
from hive_scale.config import ImagePosition
from hive_scale.data.tokenizer import Tokenizer


def chat_sample(
    key: str,
    pixels: Tensor | None,
    turns: Turns,
    tokenizer: Tokenizer,
    max_tokens: int,
    image: ImagePosition | None = "user",
) -> Sample:
    """The conversation `turns` about a picture: the targets are the assistant's words and the end of its turns.

    `image` says where the picture stands: at the head of the first question, behind the start token, or nowhere.
    Raises ValueError if the first `max_tokens` tokens, which are kept, hold no word of an answer.
    """
    tokens, is_target, slot = tokenizer.encode_parts(_parts(turns, tokenizer, image))
    if not any(is_target[:max_tokens]):
        raise ValueError(f"the first answer begins after data.max_tokens={max_tokens}")
    return Sample(key, pixels, tokens[:max_tokens], is_target[:max_tokens], slot)


def prompt(turns: Turns, tokenizer: Tokenizer, image: ImagePosition | None = "user") -> list[int]:
    """Tokens of `turns`, the last of which is the user's, up to where the assistant's answer begins."""
    return prompt_with_slot(turns, tokenizer, image)[0]


def prompt_with_slot(turns: Turns, tokenizer: Tokenizer, image: ImagePosition | None) -> tuple[list[int], int]:
    """The tokens of `prompt`, and how many of them come before the picture."""
    *asked, _, _ = _parts([*turns, {"role": "assistant", "content": "?"}], tokenizer, image)  # but for answer and end
    tokens, _, slot = tokenizer.encode_parts(asked)
    return tokens, slot


def _parts(turns: Turns, tokenizer: Tokenizer, image: ImagePosition | None) -> list[tuple[str, bool]]:
    """The conversation's text in parts, each with whether it is a target; IMAGE marks the picture's place."""
    template = tokenizer.template
    turns = [{**turn, "content": without_image(turn["content"]).strip()} for turn in turns]
    for turn in turns:
        if special := template.special_in(turn["content"]):
            raise ValueError(f"a turn of the conversation holds the tokenizer's special token {special}")
    if image == "user":
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
        asked = {**turns[first], "content": f"{IMAGE}\n{turns[first]['content']}"}
        turns = [*turns[:first], asked, *turns[first + 1 :]]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    between = template.around_answers(turns)
    parts, before = [], between[0]
    for answer, after in zip(answers, between[1:], strict=True):
        end = template.end_of_turn(after)
        asked_text = before.rstrip(" ")  # in most vocabularies a space is a piece of the word behind it
        parts += [(asked_text, False), (before[len(asked_text) :] + answer + after[:end], True)]
        before = after[end:]
    parts.append((before, False))
    if "".join(text for text, _ in parts) != template.render(turns):
        raise ValueError("the tokenizer's chat template changes an answer, such as by leaving its thoughts out")
    return parts
