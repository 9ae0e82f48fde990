"""Tux Paint's stamps: images, many of them cut-out photographs, each with an English sentence."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from hive_scale.prepare.concepts import normalise
from hive_scale.prepare.packages import Package, fetch, members
from hive_scale.prepare.records import Record

STAMPS = Package("debian", "tuxpaint-stamps-default")
_ROOT = "usr/share/tuxpaint/stamps/"


def records(cache: Path) -> list[Record]:
    """Return the stamps that are PNG (785 of 950; the others are SVG, which needs a renderer) and have a sentence.

    Raises what `fetch` raises.
    """
    found = members(fetch(STAMPS, cache), lambda name: _ROOT in name and name.endswith((".png", ".txt")))
    stamps = []
    for name, image in sorted(found.items()):
        sentence = _sentence(found.get(re.sub(r"\.png$", ".txt", name), b""))
        if name.endswith(".png") and sentence:
            stamps.append(_record(PurePosixPath(name.partition(_ROOT)[2]), image, sentence))
    return stamps


def concept_of(sentence: str) -> str:
    """Strip case, articles, digits and punctuation: "A tiger." and "Tiger!" are one concept."""
    words = re.findall(r"[^\W\d_]+", normalise(sentence))
    return " ".join(word for word in words if word not in {"a", "an", "the"}) or normalise(sentence)


def _record(path: PurePosixPath, image: bytes, sentence: str) -> Record:
    facts = {
        "label": sentence,
        "category": path.parts[0],
        "subcategory": str(path.parent),
        "source": STAMPS.name,
    }
    key = "tuxpaint-" + re.sub(r"[^\w-]", "-", str(path.with_suffix("")))
    return Record(key, image, sentence, concept_of(sentence), facts)


def _sentence(text: bytes) -> str:
    """Return the first line, which is English; translations follow it."""
    lines = text.decode(errors="replace").splitlines()
    return " ".join(lines[0].split()) if lines else ""
