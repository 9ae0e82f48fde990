"""The nouns of a benchmark: questions about images, and what a task makes of the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ImageFile:
    """Encoded bytes that are read when they are needed. Equal keys mean equal images."""

    key: str
    read: Callable[[], bytes] = field(compare=False, repr=False)


class Unanswerable(ValueError):
    """The questions that it `concerns` stay without an answer, the others go on."""

    def __init__(self, reason: str, concerns: Callable[[Question], bool]) -> None:
        super().__init__(reason)
        self.concerns = concerns


def decoded(image: ImageFile, decode: Callable[[bytes], Tensor]) -> Tensor:
    """What `decode` makes of the image's bytes. Raises Unanswerable for the ValueError of either."""
    try:
        return decode(image.read())
    except ValueError as error:
        raise Unanswerable(f"{image.key}: {error}", lambda question: question.image == image) from None


@dataclass(frozen=True)
class Question:
    """What a model is asked. `truth` is what scoring needs to know, and never shown to the model."""

    id: str  # unique in its task
    prompt: str
    image: ImageFile | None
    truth: Mapping[str, Any]


Answered = Sequence[tuple[Question, str]]  # every question of the task; "" where there is no answer


@dataclass(frozen=True)
class Task:
    """A benchmark: how its files are read, and how its answers are scored.

    `read` takes the folder of the files, and raises ValueError with what is missing and where it is to be had.
    `score` returns named figures, the one that papers quote first. Questions with equal `group` are scored together.
    """

    name: str
    read: Callable[[Path], list[Question]]
    score: Callable[[Answered], dict[str, float]]
    source: str
    max_tokens: int = 16  # of an answer
    group: Callable[[Question], Any] = attrgetter("id")

    def first(self, questions: Sequence[Question], count: int) -> list[Question]:
        """The first `count` of all `questions`, and the others of their groups."""
        groups = {self.group(one) for one in questions[:count]}
        return [one for one in questions if self.group(one) in groups]
