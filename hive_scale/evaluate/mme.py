"""MME: two yes-or-no questions per image, in fourteen subtasks (arXiv 2306.13394)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from hive_scale.data.messages import SHORT
from hive_scale.evaluate.answer_parsing import yes_or_no
from hive_scale.evaluate.readers import image_file, images_by_stem, missing_files_error, published_at, rows
from hive_scale.evaluate.vqa_types import Answered, ImageFile, Question, Task
from hive_scale.strangers import MB, read_bytes

SOURCE = "https://huggingface.co/datasets/lmms-lab/MME"
PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@published_at(SOURCE)
def read(folder: Path) -> list[Question]:
    """Read the hub's parquet files, or the official release: a folder per subtask, images and "question<tab>answer"."""
    files = sorted(folder.rglob("test-*.parquet"))
    questions: list[Question] = []
    if files:
        columns = ("question_id", "question", "answer", "category")
        for place, row in enumerate(rows(files, "image", columns)):
            questions.append(
                _question(row["category"], row["question_id"], row["question"], row["answer"], row["image"], place)
            )
        return questions
    for category in (*PERCEPTION, *COGNITION):
        questions += _release(folder / category, category, len(questions))
    if not questions:
        raise missing_files_error(folder, "test-*.parquet or a folder per subtask, such as existence/,", SOURCE)
    return questions


def _release(folder: Path, category: str, start: int) -> list[Question]:
    texts = sorted([*folder.glob("*.txt"), *folder.glob("questions_answers_YN/*.txt")])
    images = images_by_stem(folder) | images_by_stem(folder / "images")
    questions: list[Question] = []
    for path in texts:
        if path.stem not in images:
            raise ValueError(f"{path} has no image of its name in {folder}: unpack MME again")
        for line in _text(path).splitlines():
            if line.strip():
                asked, _, answer = line.rpartition("\t")
                image = image_file(images[path.stem])
                name = f"{category}/{images[path.stem].name}"
                questions.append(_question(category, name, asked, answer, image, start + len(questions)))
    return questions


def _text(path: Path) -> str:
    try:
        return read_bytes(path, MB).decode()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None


def _question(category: str, name: str, asked: str, answer: str, image: ImageFile | None, place: int) -> Question:
    truth = answer.lower().strip().replace(".", "")
    if truth not in ("yes", "no"):
        raise ValueError(f"MME {name}: the answer is '{answer}', not yes or no: the file is damaged")
    if category not in (*PERCEPTION, *COGNITION):
        raise ValueError(f"MME {name}: there is no subtask '{category}'")
    shared = ImageFile(f"mme:{category}:{name}", image.read) if image else None
    prompt = asked.strip().replace(" Please answer yes or no.", "") + SHORT
    facts = {"answer": truth, "category": category, "image": name}
    return Question(f"{place:05d}:{name}", prompt, shared, facts)


def score(answered: Answered) -> dict[str, float]:
    """Sum, perception (at most 2000), cognition (800), and each subtask (200): acc + acc+, both in percent.

    acc is the share of right answers, acc+ the share of images with both answers right. Raises ValueError for an image
    without exactly two questions.
    """
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, answer in answered:
        category, image = _pair(question)
        right[category][image].append(yes_or_no(answer) == question.truth["answer"])
    subtasks = {}
    for category in (name for name in (*PERCEPTION, *COGNITION) if name in right):
        images = right[category]
        if odd := [name for name, marks in images.items() if len(marks) != 2]:
            raise ValueError(f"MME {odd[0]} has {len(images[odd[0]])} questions: MME asks two an image")
        points = [50.0 * sum(marks) + 100.0 * all(marks) for marks in images.values()]
        subtasks[category] = sum(points) / len(points)
    halves = {
        "perception": sum(subtasks.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(subtasks.get(name, 0.0) for name in COGNITION),
    }
    return {"sum": sum(halves.values()), **halves, **subtasks}


def _pair(question: Question) -> tuple[str, str]:
    """Key shared by the two questions about an image."""
    return question.truth["category"], question.truth["image"]


TASK = Task("mme", read, score, SOURCE, group=_pair)
