"""What a record says: the names of its image, its captions, its conversation, in the words of public data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hive_scale.chat_template import IMAGE
from hive_scale.data.messages import is_text, parse_messages

IMAGES = (  # columns of images, in order of preference; filepath is open_clip's, file_name COCO's and the hub's
    *("image", "images", "filepath", "file_name", "filename", "image_path", "image_name", "path", "img", "file"),
)
CAPTIONS = (  # columns of captions, in order of preference; title is open_clip's, comment Flickr30k's
    *("caption", "captions", "text", "txt", "title", "comment", "class"),
)


def image_name(record: Mapping[str, Any], column: str) -> str:
    """Return the name of the record's image in `column`, or in the first of `IMAGES` that it has.

    Raises ValueError with the reason if it names no image, or several.
    """
    found = [column] if column else [name for name in IMAGES if record.get(name)]
    if column and column not in record:
        raise ValueError(f"no column '{column}', but {columns(record)} (--image COLUMN)")
    named = record[found[0]] if found else _named_in_parts(record)
    if isinstance(named, list) and len(named) > 1:
        raise ValueError(f"{len(named)} images: only one is supported")
    if isinstance(named, list):
        named = named[0] if named else None
    if isinstance(named, dict):  # the hub's {bytes, path}
        named = named.get("path")
    if isinstance(named, str) and named:
        return named
    if named:
        raise ValueError(f"no name of an image in column '{found[0]}', but a {type(named).__name__} (--image COLUMN)")
    if is_conversation(record):
        raise ValueError("no image: text alone")
    remedy = "fetch the images with img2dataset, or say " if {"url", "URL"} & record.keys() else ""
    raise ValueError(f"no image in {columns(record)} ({remedy}--image COLUMN)")


def captions_of(record: Mapping[str, Any], column: str = "") -> tuple[list[str], dict[str, Any]]:
    """Return (the record's captions, the record to write).

    The first caption is the one paired with the image in pre-training; for a conversation, its first answer. The
    record to write has all of several captions in ``captions``, and conversations of any form as ``messages`` or
    ``conversations``. Raises ValueError if there is no caption, or if it is no text.
    """
    kept = with_messages(record)
    if column and column not in record:
        raise ValueError(f"no column '{column}', but {columns(record)} (--caption COLUMN)")
    if column or not is_conversation(kept):
        name = column or next((name for name in CAPTIONS if _texts(record.get(name))), "")
        captions = _texts(record.get(name))
        if len(captions) > 1 and (name == "captions" or "captions" not in record):
            del kept[name]
            kept["captions"] = captions
    else:
        captions = [turn["content"] for turn in parse_messages(kept) if turn["role"] == "assistant"][:1]
    if not captions:
        empty = next((name for name in (column, *CAPTIONS) if name and isinstance(record.get(name), str)), "")
        if empty:
            raise ValueError(f"the caption in column '{empty}' is empty (--caption COLUMN)")
        raise ValueError(f"neither a conversation nor a caption in {columns(record)} (--caption COLUMN)")
    if not all(map(is_text, captions)):
        raise ValueError("the caption has bytes that are no text (--encoding NAME)")
    return [caption.strip() for caption in captions], kept


def is_conversation(record: Mapping[str, Any]) -> bool:
    """True if the record has a conversation in any form that `with_messages` reads."""
    return bool(record.get("conversations") or record.get("messages") or _questions(record) or _prompted(record))


def with_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the record with its conversation as training reads it.

    The Cauldron's ``texts`` ({user, assistant}) and TRL's ``prompt`` and ``completion`` become ``messages``. The
    content parts of TRL and transformers ({type: image or text}) become one text with the image's placeholder. Raises
    ValueError for parts of another type.
    """
    kept = dict(record)
    if not (record.get("conversations") or record.get("messages")):
        if asked := _questions(record):
            kept["messages"] = [turn for one in asked for turn in _question(one)]
            del kept["texts"]
        elif said := _prompted(record):
            kept["messages"] = said
            del kept["prompt"], kept["completion"]
    if isinstance(messages := kept.get("messages"), list):
        kept["messages"] = [_flat(turn) for turn in messages]
    return kept


def columns(record: Mapping[str, Any]) -> str:
    """Name the record's first columns, for messages."""
    return ", ".join(list(map(str, record))[:6]) or "no columns"


def _texts(value: Any) -> list[str]:
    """Return the texts in a cell: one, or a list of several."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one.strip()]


def _questions(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = record.get("texts")
    fits = isinstance(asked, list) and all(
        isinstance(one, dict) and {"user", "assistant"} <= one.keys() for one in asked
    )
    return asked if fits and isinstance(asked, list) else []


def _question(one: Mapping[str, Any]) -> list[dict[str, Any]]:
    more = {key: value for key, value in one.items() if key not in ("user", "assistant")}  # its source
    return [{"role": "user", "content": one["user"], **more}, {"role": "assistant", "content": one["assistant"]}]


def _prompted(record: Mapping[str, Any]) -> list[Any]:
    prompt, completion = record.get("prompt"), record.get("completion")
    return [*prompt, *completion] if isinstance(prompt, list) and isinstance(completion, list) else []


def _flat(turn: Any) -> Any:
    """Return `turn` with its content as one text."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    texts = []
    for part in turn["content"]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise ValueError(f"a content part of type '{kind}': only an image and text are supported")
        texts.append(IMAGE if kind == "image" else part["text"])
    return turn | {"content": "\n".join(texts)}


def _named_in_parts(record: Mapping[str, Any]) -> list[Any]:
    """Return the images that content parts name themselves: {type: image, image: NAME}, or path."""
    turns = record.get("messages") or _prompted(record)
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [part.get("image") or part.get("path") for part in parts if part.get("type") == "image"]
