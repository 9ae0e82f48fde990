"""Group emoji that show the same concept; the split into train and held-out keeps concepts whole.

"woman farmer", "man farmer" and "farmer" are one concept, and so are the 24 clock faces: with one of them in the
training set, a held-out one would test memory. Each country's flag is a concept of its own.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

_GENDER = "man woman person men women people man's woman's men's women's boy girl child adult old older mrs mx santa"
_COLOUR = "red orange yellow green blue purple brown black white grey pink light dark blond"
_SIZE = "large small medium big"
_DIRECTION = (
    "left right up down upwards downwards leftwards rightwards facing backhand clockwise counterclockwise "
    "fast north south east west"
)
_STATE = "open closed lowered raised done not low high volume muted increasing decreasing double"
_VARIANT = frozenset(f"{_GENDER} {_COLOUR} {_SIZE} {_DIRECTION} {_STATE}".split())

_PLAIN_QUOTES = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")
_WHOLE = {  # a pattern found anywhere in the label determines the concept
    r"o'clock|-thirty": "clock face",
    r"^(family|families)\b": "family",
    r"^kiss(:|$)": "kiss",
    r"^couple with heart": "couple with heart",
    r"^keycap": "keycap",
    r"\bmoon\b(?! cake| viewing)": "moon",
    r"\bmer(man|maid|person)\b": "merperson",
    r"\bprince(ss)?\b|person with crown": "prince",
    r"\bhair$|: bald$": "hair",
    r"^globe ": "globe",
    r"\bsnowman\b": "snowman",
    r"place medal": "place medal",
    r"\b(un)?locked\b": "lock",
    r"^star of david|six-pointed star": "six-pointed star",
    r"(question|exclamation) mark$": "mark",
    r"^input ": "input",
    # faces that differ by a few pixels of an eyebrow or a mouth
    r"^(neutral|expressionless) face": "neutral face",
    r"^grinning (squinting )?face": "grinning face",
    r"^(slightly )?frowning face|^(anguished|worried|confused) face": "frowning face",
}
_TAIL_IS_DETAIL = frozenset(  # "umbrella with rain drops" is an umbrella, but "face with tongue" is its own concept
    {"animals & nature", "food & drink", "travel & places", "activities", "objects", "symbols"}
)


def normalise(label: str) -> str:
    """Return `label` in lower case, NFC-composed, with plain quotes and single spaces."""
    text = unicodedata.normalize("NFC", label).lower()
    return " ".join(text.translate(_PLAIN_QUOTES).split())


def concept_of(label: str, category: str) -> str:
    """Return the concept of a normalised `label`; variants (gender, colour, direction ...) share it."""
    if label.startswith("flag: "):
        return label
    for pattern, concept in _WHOLE.items():
        if re.search(pattern, label):
            return concept
    text = label
    if category in _TAIL_IS_DETAIL:
        text = re.sub(r" with .*| face$", "", text)
    words = [word for word in re.findall(r"[\w']+", text) if word not in _VARIANT]
    return " ".join(_singular(word) for word in words) or "person"


def merge(concepts: Iterable[str], images: Iterable[bytes]) -> dict[str, str]:
    """Map each concept to its representative, after merging concepts that share an identical image.

    The flags of Norway and of Bouvet Island, for example, are the same image under two names.
    """
    parent: dict[str, str] = {}
    first_with: dict[bytes, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for concept, image in zip(concepts, images, strict=True):
        parent.setdefault(concept, concept)
        twin = first_with.setdefault(image, concept)
        low, high = sorted((root(concept), root(twin)))
        parent[high] = low
    return {name: root(name) for name in parent}


def fraction(name: str) -> float:
    """Map `name` to a number in [0, 1) that depends on nothing else: the same on any machine, in any version."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()  # file names may be any bytes
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(concept: str, heldout: float = 0.15) -> str:
    """Return "heldout" for about a share `heldout` of all concepts, else "train"."""
    return "heldout" if fraction(concept) < heldout else "train"


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") else word
