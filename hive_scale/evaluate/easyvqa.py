"""easy-vqa: questions about one rendered coloured shape, thirteen answers. Small, but a published benchmark."""

from __future__ import annotations

from pathlib import Path

from hive_scale.data.messages import SHORT
from hive_scale.evaluate.answer_parsing import plain_normal
from hive_scale.evaluate.readers import image_file, missing_files_error, published_at, read_json
from hive_scale.evaluate.vqa_types import Answered, Question, Task

SOURCE = "the PyPI package easy-vqa (launchers/prepare_data.py easy_vqa)"


@published_at(SOURCE)
def read(folder: Path) -> list[Question]:
    """Read the package's layout: test/questions.json with [question, answer, image number], and test/images/."""
    path = folder / "test" / "questions.json"
    if not path.is_file():
        raise missing_files_error(folder, "test/questions.json", SOURCE)
    images = path.parent / "images"
    return [
        Question(str(place), one[0] + SHORT, image_file(images / f"{one[2]}.png"), {"answer": one[1]})
        for place, one in enumerate(read_json(path))
    ]


def score(answered: Answered) -> dict[str, float]:
    """Accuracy in percent: over all questions, and over those whose answer is not yes or no ("named")."""
    marks = [(plain_normal(answer) == q.truth["answer"], q.truth["answer"]) for q, answer in answered]
    named = [right for right, truth in marks if truth not in ("yes", "no")]
    return {
        "accuracy": 100.0 * sum(right for right, _ in marks) / max(1, len(marks)),
        "named": 100.0 * sum(named) / max(1, len(named)),
    }


TASK = Task("easyvqa", read, score, SOURCE)
