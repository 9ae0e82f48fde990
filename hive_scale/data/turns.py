"""Conversations as public sets record them, as turns of user and assistant."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, takewhile
from typing import Any

from hive_scale.chat_template import IMAGE, without_image

SHORT = "\nAnswer the question using a single word or phrase."  # what LLaVA adds to questions with short answers
Turns = list[dict[str, str]]  # {"role": "system", "user" or "assistant", "content": text}

ROLES = {
    **{"human": "user", "user": "user", "system": "system"},
    **{"gpt": "assistant", "assistant": "assistant", "model": "assistant"},
}


def turns_of(record: Mapping[str, Any]) -> Turns:
    """The conversation in `record`, cut after its last answer, the picture's place in it left out.

    Reads LLaVA's ``conversations`` ({from, value}) and the hub's ``messages`` ({role, content}). Raises ValueError
    for more than one picture, and for turns that are no question and answer in turns.
    """
    said = record.get("conversations") or record.get("messages")
    if not isinstance(said, list):
        raise ValueError("no conversation in its .json: data.text=conversation needs 'conversations' or 'messages'")
    turns = [_turn(one) for one in said]
    pictures = record.get("image", record.get("images"))
    count = max(sum(turn["content"].count(IMAGE) for turn in turns), len(pictures) if isinstance(pictures, list) else 1)
    if count > 1:
        raise ValueError(f"the conversation is about {count} pictures: only one is supported")
    turns = [turn | {"content": without_image(turn["content"]).strip()} for turn in turns]
    system = list(takewhile(lambda turn: turn["role"] == "system", turns))
    rest = turns[len(system) :]
    rest = rest[: len(rest) // 2 * 2]  # a last question without an answer teaches nothing
    if not rest or any(turn["role"] != role for turn, role in zip(rest, cycle(("user", "assistant")), strict=False)):
        raise ValueError("the conversation does not alternate between user and assistant, beginning with the user")
    if not all(turn["content"] for turn in rest[1::2]):
        raise ValueError("an answer of the conversation is empty")
    return [*system, *rest]


def is_text(words: str) -> bool:
    """Whether `words` can be written as UTF-8: JSON can spell a lone surrogate, half of a character."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turn(said: Any) -> dict[str, str]:
    if isinstance(said, dict):
        name, content = said.get("from", said.get("role")), said.get("value", said.get("content"))
        if isinstance(name, str) and name in ROLES and isinstance(content, str):
            if not is_text(content):
                raise ValueError("a turn of the conversation holds half a character (a lone surrogate)")
            return {"role": ROLES[name], "content": content}
    raise ValueError("a turn of the conversation is not {from: human or gpt, value: text}")
