"""Normalise and parse answers by the rules of each benchmark's own scorer."""

from __future__ import annotations

import re
import string

_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED.split())}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")  # but no decimal point
_MOST_STOPS = 32  # full stops dropped: the server passes a flag in place of re.sub's count
_LETTERS = frozenset(string.ascii_uppercase)
_SENTENCE = re.compile("The answer is ([A-Z]).")
# Words whose apostrophe may be left out. Each covers every spelling that lacks one of its apostrophes.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
_WITH_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one entry of the published table in the other direction


def vqa_normal(answer: str) -> str:
    """Normalise an answer as the server of the VQA challenge (EvalAI) does before comparing.

    Lower case, punctuation and articles dropped, number words up to ten as digits, apostrophes restored.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _MARKS:
        # a mark beside a space is dropped; between letters it becomes a space
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text, count=_MOST_STOPS).split())
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def plain_normal(answer: str) -> str:
    """Normalise an answer as GQA's exact match does: no outer spaces, lower case, no punctuation.

    A space beside punctuation stays, as in the original: "red -" does not match "red".
    """
    return answer.strip().lower().translate(str.maketrans("", "", string.punctuation))


def yes_or_no(answer: str) -> str:
    """Return "yes", "no" or "other" from an answer's first four letters, as MME's scorer does."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def choice_letter(answer: str) -> str:
    """Return the capital letter that an answer chooses, or "", as ScienceQA's published scorers do.

    Accepted are "B" or "b" alone, "B." followed by anything, or exactly one "The answer is B." in the text. In the
    last case the authors' own scorer requires some character after the letter, and LLaVA's applies the rule only if
    the text begins otherwise.
    """
    text = answer.strip()
    if len(text) == 1 or (text[:1] in _LETTERS and text[1:2] == "."):
        return text[0].upper() if text[0] in string.ascii_letters else ""
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else ""
