"""OK-VQA, val2014: questions that need outside knowledge, with ten people's answers (arXiv 1906.00067)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hive_scale.data.messages import SHORT
from hive_scale.evaluate.answer_parsing import vqa_normal
from hive_scale.evaluate.readers import image_file, missing_files_error, published_at, read_json, rows
from hive_scale.evaluate.vqa_types import Answered, ImageFile, Question, Task

SOURCE = "https://huggingface.co/datasets/lmms-lab/OK-VQA or https://okvqa.allenai.org"
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
ASKED, ANSWERED = "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"


@published_at(SOURCE)
def read(folder: Path) -> list[Question]:
    """Read the hub's parquet files, or the official questions and annotations with COCO's val2014 images."""
    files = sorted(folder.rglob("val2014-*.parquet"))
    if files:
        found = rows(files, "image", ["question_id", "question", "answers"])
        return [_question(row["question_id"], row["question"], row["answers"], row["image"]) for row in found]
    for name in (ASKED, ANSWERED):
        if not (folder / name).is_file():
            raise missing_files_error(folder, f"val2014-*.parquet or {name}", SOURCE)
    answers = {
        item["question_id"]: [one["answer"] for one in item["answers"]]
        for item in read_json(folder / ANSWERED)["annotations"]
    }
    questions = []
    for item in read_json(folder / ASKED)["questions"]:
        id = item["question_id"]
        if id not in answers:
            raise ValueError(f"{ANSWERED} has no answers to question {id} of {ASKED}: take both from one release")
        image = image_file(folder / "val2014" / f"COCO_val2014_{item['image_id']:012d}.jpg")
        questions.append(_question(id, item["question"], answers[id], image))
    return questions


def _question(id: object, asked: str, answers: Sequence[str], image: ImageFile | None) -> Question:
    return Question(str(id), asked.strip() + UNSURE + SHORT, image, {"answers": list(answers)})


def score(answered: Answered) -> dict[str, float]:
    """Soft accuracy in percent; see `soft_accuracy`."""
    marks = [soft_accuracy(answer, question.truth["answers"]) for question, answer in answered]
    return {"accuracy": 100.0 * sum(marks) / max(1, len(marks))}


def soft_accuracy(answer: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3) among the other people's answers, averaged over leaving out each person in turn."""
    given, told = vqa_normal(answer), [vqa_normal(one) for one in answers]
    matches = [one == given for one in told]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / max(1, len(matches))


TASK = Task("okvqa", read, score, SOURCE)
