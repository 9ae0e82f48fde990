"""Conversations, tokenized with their targets."""

from __future__ import annotations

from torch import Tensor

from hive_scale.batch import Sample
from hive_scale.chat_template import IMAGE, without_image
from hive_scale.config import ImagePosition
from hive_scale.data.messages import Messages
from hive_scale.data.tokenizer import Tokenizer


def tokenize_conversation(
    key: str,
    pixels: Tensor | None,
    turns: Messages,
    tokenizer: Tokenizer,
    max_tokens: int,
    image: ImagePosition | None = "user",
) -> Sample:
    """Tokenize the conversation `turns` about an image. The targets are the assistant's words and end-of-turn tokens.

    `image` is the image's place: "user" at the head of the first question, "start" behind the start token, None for no
    image. Only the first `max_tokens` tokens are kept. Raises ValueError if they hold no target, or if a turn contains
    a special token.
    """
    tokens, is_target, slot = tokenizer.encode_parts(_parts(turns, tokenizer, image))
    if not any(is_target[:max_tokens]):
        raise ValueError(f"the first answer begins after data.max_tokens={max_tokens}")
    return Sample(key, pixels, tokens[:max_tokens], is_target[:max_tokens], slot)


def prompt(turns: Messages, tokenizer: Tokenizer, image: ImagePosition | None = "user") -> list[int]:
    """Return the tokens of `turns`, whose last turn is the user's, up to where the assistant's answer begins."""
    return prompt_with_slot(turns, tokenizer, image)[0]


def prompt_with_slot(turns: Messages, tokenizer: Tokenizer, image: ImagePosition | None) -> tuple[list[int], int]:
    """Return the tokens of `prompt` and the number of them that precede the image."""
    # the last two parts, the answer and what follows it, are dropped
    *asked, _, _ = _parts([*turns, {"role": "assistant", "content": "?"}], tokenizer, image)
    tokens, _, slot = tokenizer.encode_parts(asked)
    return tokens, slot


def _parts(turns: Messages, tokenizer: Tokenizer, image: ImagePosition | None) -> list[tuple[str, bool]]:
    """Split the conversation's text into (text, is target) parts; IMAGE marks the image's place."""
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
        asked_text = before.rstrip(" ")  # most vocabularies attach a space to the word after it
        parts += [(asked_text, False), (before[len(asked_text) :] + answer + after[:end], True)]
        before = after[end:]
    parts.append((before, False))
    if "".join(text for text, _ in parts) != template.render(turns):
        raise ValueError("the tokenizer's chat template changes an answer, such as by leaving its thoughts out")
    return parts
