"""Conversations of public data sets, parsed to user and assistant turns.

This module imports no torch: converters read conversations, and their commands answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, takewhile
from typing import Any

from hive_scale.chat_template import IMAGE, without_image

SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA's prompt for short answers
Messages = list[dict[str, str]]  # {"role": "system", "user" or "assistant", "content": text}

ROLES = {
    **{"human": "user", "user": "user", "system": "system"},
    **{"gpt": "assistant", "assistant": "assistant", "model": "assistant"},
}


def parse_messages(record: Mapping[str, Any]) -> Messages:
    """Return the conversation in `record`, cut after its last answer and without the image placeholder.

    Reads LLaVA's ``conversations`` ({from, value}) and the hub's ``messages`` ({role, content}). Raises ValueError if
    there is more than one image, if an answer is empty, or if the turns do not alternate between user and assistant.
    """
    said = record.get("conversations") or record.get("messages")
    if not isinstance(said, list):
        raise ValueError("no conversation in its .json: data.format=conversation needs 'conversations' or 'messages'")
    turns = [_turn(one) for one in said]
    images = record.get("image", record.get("images"))
    count = max(sum(turn["content"].count(IMAGE) for turn in turns), len(images) if isinstance(images, list) else 1)
    if count > 1:
        raise ValueError(f"the conversation is about {count} images: only one is supported")
    turns = [turn | {"content": without_image(turn["content"]).strip()} for turn in turns]
    system = list(takewhile(lambda turn: turn["role"] == "system", turns))
    rest = turns[len(system) :]
    rest = rest[: len(rest) // 2 * 2]  # a last question without an answer has no targets
    if not rest or any(turn["role"] != role for turn, role in zip(rest, cycle(("user", "assistant")), strict=False)):
        raise ValueError("the conversation does not alternate between user and assistant, beginning with the user")
    if not all(turn["content"] for turn in rest[1::2]):
        raise ValueError("an answer of the conversation is empty")
    return [*system, *rest]


def is_text(words: str) -> bool:
    """True if `words` can be encoded as UTF-8. JSON can spell a lone surrogate (half a character), which cannot."""
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
