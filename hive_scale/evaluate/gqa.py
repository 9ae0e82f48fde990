"""GQA, the balanced test-dev split: compositional questions with one-word answers (arXiv 1902.09506)."""

from __future__ import annotations

from pathlib import Path

from hive_scale.data.messages import SHORT
from hive_scale.evaluate.answer_parsing import plain_normal
from hive_scale.evaluate.readers import image_file, missing_files_error, published_at, read_json, rows
from hive_scale.evaluate.vqa_types import Answered, ImageFile, Question, Task

SOURCE = "https://huggingface.co/datasets/lmms-lab/GQA or https://cs.stanford.edu/people/dorarad/gqa"


@published_at(SOURCE)
def read(folder: Path) -> list[Question]:
    """Read the hub's parquet files, or the official testdev_balanced_questions.json with images/<imageId>.jpg."""
    asked = sorted(folder.glob("testdev_balanced_instructions/*.parquet"))
    if asked:
        held = rows(sorted(folder.glob("testdev_balanced_images/*.parquet")), "image", ["id"])
        images = {str(row["id"]): row["image"] for row in held}
        items = [(row["id"], row) for row in rows(asked, "", ["id", "imageId", "question", "answer"])]
        if missing := [row["imageId"] for _, row in items if not images.get(row["imageId"])]:
            raise ValueError(f"{folder}/testdev_balanced_images has no image {missing[0]}; the files are at {SOURCE}")
        return [_question(id, row["question"], row["answer"], images[row["imageId"]]) for id, row in items]
    official = folder / "testdev_balanced_questions.json"
    if not official.is_file():
        wanted = "testdev_balanced_instructions/*.parquet or testdev_balanced_questions.json"
        raise missing_files_error(folder, wanted, SOURCE)
    return [
        _question(id, item["question"], item["answer"], image_file(folder / "images" / f"{item['imageId']}.jpg"))
        for id, item in read_json(official).items()
    ]


def _question(id: str, asked: str, answer: str, image: ImageFile) -> Question:
    return Question(str(id), asked.strip() + SHORT, image, {"answer": answer})


def score(answered: Answered) -> dict[str, float]:
    """Percent of answers equal to the truth, ignoring case and punctuation."""
    right = [plain_normal(answer) == plain_normal(question.truth["answer"]) for question, answer in answered]
    return {"accuracy": 100.0 * sum(right) / max(1, len(right))}


TASK = Task("gqa", read, score, SOURCE)
