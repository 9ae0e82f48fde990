"""Emoji in three drawing styles, with their Unicode names: 5,663 images of 1,906 signs.

Captions such as "mammal: tiger face" name the kind of thing first, then its name. A model can recognise the kind of a
concept it has never seen, but mostly not its name. (Some Unicode names have this form already: "flag: Andorra".)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from hive_scale.prepare.concepts import concept_of, fraction, merge, normalise
from hive_scale.prepare.jpeg import Jpeg, on_white
from hive_scale.prepare.packages import Package, fetch, members
from hive_scale.prepare.records import Record

LABELS = Package("npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
STYLES = {
    "noto": Package(
        "npm",
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twemoji": Package(
        "npm",
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "fluent": Package(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
}
_FOLDER = {"noto": "package/img/google/64/", "twemoji": "package/img/twitter/64/", "fluent": "package/assets/"}

_MISDRAWN = {"noto-1f1e8-1f1f6"}  # the package draws Saudi Arabia's flag as Sark's

# The shipped sample: one image per concept, classes of similar size. Symbols and flags are fewer, because their
# names cannot be inferred from images of others.
_SAMPLE_LIMIT = {"symbols": 60, "flags": 60}
_SAMPLE_LIMIT_ELSEWHERE = 135

_KINDS = {
    "smiling face": "face-smiling",
    "loving face": "face-affection",
    "playful face": "face-tongue",
    "face and hand": "face-hand",
    "doubting face": "face-neutral-skeptical",
    "sleepy face": "face-sleepy",
    "sick face": "face-unwell",
    "face in a hat": "face-hat",
    "face in glasses": "face-glasses",
    "sad face": "face-concerned",
    "angry face": "face-negative",
    "creature": "face-costume",
    "cat": "cat-face",
    "monkey": "monkey-face",
    "feeling": "emotion",
    "hand": "hand-fingers-open, hand-fingers-partial, hand-single-finger, hand-fingers-closed, hands, hand-prop",
    "part of the body": "body-parts",
    "person": "person-gesture, person-role, person-activity, person-resting, person-symbol",
    "legend": "person-fantasy",
    "athlete": "person-sport",
    "sea animal": "animal-marine, food-marine",
    "plant": "plant-other",
    "dish": "food-prepared, food-asian",
    "landscape": "place-geographic",
    "holy place": "place-religious",
    "place": "place-other, hotel",
    "vehicle": "transport-ground",
    "boat": "transport-water",
    "aircraft": "transport-air",
    "clock": "time",
    "sky": "sky & weather",
    "party": "event",
    "art": "arts & crafts",
    "light": "light & video",
    "paper": "book-paper",
    "pen": "writing",
    "medicine": "medical",
    "thing at home": "household",
    "object": "other-object",
    "sign": "transport-sign, warning",
    "star sign": "zodiac",
    "button": "av-symbol",
    "letters": "alphanum",
    "sum": "math",
    "shape": "geometric",
    "symbol": "other-symbol, gender, religion",
}
_KIND_OF = {subcategory: kind for kind, group in _KINDS.items() for subcategory in group.split(", ")}


@dataclass(frozen=True)
class Emoji:
    """One sign of the catalogue. `code` holds its code points in the format of `_code`."""

    code: str
    label: str
    category: str
    subcategory: str
    concept: str = ""


def caption_of(label: str, subcategory: str) -> str:
    """Return a caption such as "mammal: tiger face". A label that names its kind ("flag: andorra") is unchanged."""
    if ": " in label:
        return label
    kind = _KIND_OF.get(subcategory, subcategory.rpartition("-")[2])
    return f"{kind}: {label}" if kind != label else label


def sample(cache: Path) -> list[Record]:
    """Return the records of the shipped sample: about 1,000 Noto drawings, one per concept. Raises as `records`."""
    chosen: dict[str, Record] = {}
    for record in sorted(records(["noto"], cache), key=lambda r: (len(r.metadata["label"]), r.key)):
        chosen.setdefault(record.concept, record)  # the shortest label is the plainest variant
    kept: dict[str, list[Record]] = {}
    for record in sorted(chosen.values(), key=lambda r: fraction(r.key)):
        kept.setdefault(record.metadata["category"], []).append(record)
    return [
        record
        for category, found in kept.items()
        for record in found[: _SAMPLE_LIMIT.get(category, _SAMPLE_LIMIT_ELSEWHERE)]
    ]


def records(styles: Sequence[str], cache: Path) -> list[Record]:
    """Return every sign without skin tone in each of `styles` (keys of `STYLES`). Raises what `fetch` raises."""
    noto = _drawings("noto", cache, with_catalogue=True)
    catalogue = _catalogue(json.loads(noto.pop("emoji.json")), cache)
    images = {_code(name): data for name, data in noto.items()}
    signs = _with_concepts([sign for sign in catalogue if sign.code in images], images)
    found = []
    for style in styles:
        if style != "noto":
            images = {_code(name): data for name, data in _drawings(style, cache).items()}
        found += [_record(sign, style, images[sign.code]) for sign in signs if sign.code in images]
    return [record for record in found if record.key not in _MISDRAWN]


def _record(sign: Emoji, style: str, image: bytes) -> Record:
    facts = {
        "label": sign.label,
        "category": sign.category,
        "subcategory": sign.subcategory,
        "hexcode": sign.code,
        "source": f"{style} ({STYLES[style]})",
    }
    caption = caption_of(sign.label, sign.subcategory)
    return Record(f"{style}-{sign.code}", image, caption, sign.concept, facts)


def _drawings(style: str, cache: Path, with_catalogue: bool = False) -> dict[str, bytes]:
    def wanted(name: str) -> bool:
        return name.startswith(_FOLDER[style]) or (with_catalogue and name == "package/emoji.json")

    found = members(fetch(STYLES[style], cache), wanted)
    return {PurePosixPath(name).name: data for name, data in found.items()}


def _catalogue(entries: list[dict[str, str]], cache: Path) -> Iterator[Emoji]:
    [names] = members(fetch(LABELS, cache), lambda name: name == "package/en/data.json").values()
    labels = {_code(entry["hexcode"]): entry["label"] for entry in json.loads(names)}
    for entry in entries:
        code, category = _code(entry["unified"]), entry["category"].lower()
        if category != "component":
            yield Emoji(code, normalise(labels[code]), category, entry["subcategory"])


def _with_concepts(signs: list[Emoji], images: dict[str, bytes]) -> list[Emoji]:
    own = [concept_of(sign.label, sign.category) for sign in signs]
    pixels = [on_white(images[sign.code], Jpeg().max_pixels).tobytes() for sign in signs]
    merged = merge(own, pixels)
    return [replace(sign, concept=merged[concept]) for sign, concept in zip(signs, own, strict=True)]


def _code(name: str) -> str:
    """Normalise a file name or hexcode to code points comparable among packages: no FE0F, no leading zeros."""
    stem = name.partition(".")[0].lower()
    return "-".join(part.lstrip("0") for part in stem.split("-") if part != "fe0f")
