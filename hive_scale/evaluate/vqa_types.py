"""Data types of VQA benchmarks: images, questions and tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that a mistake in a command is answered before torch is imported, which takes long
    from torch import Tensor


@dataclass(frozen=True)
class ImageFile:
    """An image whose encoded bytes are read on demand. Equal keys mean equal images."""

    key: str
    read: Callable[[], bytes] = field(compare=False, repr=False)


class Unanswerable(ValueError):
    """Raised if some questions cannot be answered: those that it `concerns`. The others can still be asked."""

    def __init__(self, reason: str, concerns: Callable[[Question], bool]) -> None:
        super().__init__(reason)
        self.concerns = concerns


def decoded(image: ImageFile, decode: Callable[[bytes], Tensor]) -> Tensor:
    """Read and decode an image. Raises Unanswerable if either step raises ValueError."""
    try:
        return decode(image.read())
    except ValueError as error:
        raise Unanswerable(f"{image.key}: {error}", lambda question: question.image == image) from None


@dataclass(frozen=True)
class Question:
    """A question to a model. `truth` holds what scoring needs; the model never sees it."""

    id: str  # unique within its task
    prompt: str
    image: ImageFile | None
    truth: Mapping[str, Any]


Answered = Sequence[tuple[Question, str]]  # every question of the task with its answer; "" if unanswered


@dataclass(frozen=True)
class Task:
    """A benchmark: how to read its files and how to score answers.

    `read` takes the folder of the files, and raises ValueError that says what is missing and where to get it. `score`
    returns named figures, the one that papers quote first. Questions with equal `group` are scored together.
    """

    name: str
    read: Callable[[Path], list[Question]]
    score: Callable[[Answered], dict[str, float]]
    source: str
    max_tokens: int = 16  # limit of an answer
    group: Callable[[Question], Any] = attrgetter("id")

    def first(self, questions: Sequence[Question], count: int) -> list[Question]:
        """Return the first `count` of all `questions`, plus the other members of their groups."""
        groups = {self.group(one) for one in questions[:count]}
        return [one for one in questions if self.group(one) in groups]
