"""ScienceQA, test split: multiple-choice school questions, half of them about an image (arXiv 2209.09513)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from hive_scale.evaluate.answer_parsing import choice_letter
from hive_scale.evaluate.readers import image_file, missing_files_error, published_at, read_json, rows
from hive_scale.evaluate.vqa_types import Answered, ImageFile, Question, Task

SOURCE = "https://huggingface.co/datasets/lmms-lab/ScienceQA or https://scienceqa.github.io"
LETTER = "\nAnswer with the option's letter from the given choices directly."


@published_at(SOURCE)
def read(folder: Path) -> list[Question]:
    """Read the hub's parquet files (ScienceQA-FULL, else ScienceQA-IMG), or the official release.

    The official release has problems.json, pid_splits.json and images/test/<id>/image.png.
    """
    files = sorted(folder.glob("ScienceQA-FULL/test-*.parquet")) or sorted(folder.rglob("test-*.parquet"))
    if files:
        found = rows(files, "image", ["question", "choices", "answer", "hint"])
        return [
            _question(place, row["question"], row["choices"], row["answer"], row["hint"], row["image"])
            for place, row in enumerate(found)
        ]
    for name in ("problems.json", "pid_splits.json"):
        if not (folder / name).is_file():
            raise missing_files_error(folder, f"ScienceQA-FULL/test-*.parquet or {name}", SOURCE)
    problems, questions = read_json(folder / "problems.json"), []
    for id in read_json(folder / "pid_splits.json")["test"]:
        item = problems[id]
        image = image_file(folder / "images" / "test" / id / item["image"]) if item["image"] else None
        questions.append(_question(id, item["question"], item["choices"], item["answer"], item["hint"], image))
    return questions


def _question(
    id: object, asked: str, choices: Sequence[str], answer: int, hint: str | None, image: ImageFile | None
) -> Question:
    if not 0 <= answer < len(choices):
        raise ValueError(f"ScienceQA question {id}: its answer is choice {answer} of {len(choices)}, counted from 0")
    letters = string.ascii_uppercase
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False))
    context = f"Context: {hint}\n" if hint else ""
    return Question(str(id), f"{context}{asked}\n{options}{LETTER}", image, {"answer": letters[answer]})


def score(answered: Answered) -> dict[str, float]:
    """Percent of correct letters: over all questions ("full"), and over those about an image ("image").

    The paper does not say which one it reports; the authors' code computes "full".
    """
    marks = [(choice_letter(answer) == q.truth["answer"], q.image is not None) for q, answer in answered]
    seen = [right for right, about_image in marks if about_image]
    scores = {"image": 100.0 * sum(seen) / max(1, len(seen))}
    if len(seen) < len(marks):
        scores = {"full": 100.0 * sum(right for right, _ in marks) / len(marks)} | scores
    return scores


TASK = Task("scienceqa", read, score, SOURCE)
