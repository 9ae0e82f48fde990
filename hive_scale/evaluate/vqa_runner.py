"""Ask a model a task's questions: in batches, over all ranks, resumable, each question once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from hive_scale.config import DataConfig
from hive_scale.data.conversation import prompt_with_slot
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.data.transform import blank, decode, to_pixels
from hive_scale.distributed import World
from hive_scale.evaluate.vqa_types import ImageFile, Question, Task, Unanswerable, decoded
from hive_scale.model.generate import generate
from hive_scale.model.hive import Hive
from hive_scale.model.identity import identity, identity_of_processor, key_of
from hive_scale.model.llava import StockLlava
from hive_scale.phase_timer import tick
from hive_scale.strict_json import dumps, read_lines

PREDICTIONS = "predictions.jsonl"
# fields of DataConfig that select and load samples; they do not affect how an image and its prompt are processed
LOADING = {
    *(
        "train",
        "heldout",
        "tokenizer",
        "blank_images",
        "shuffle_window",
        "workers",
        "decode_threads",
        "cache_gb",
        "retry_seconds",
    ),
    *("max_bad_samples", "max_bad_share", "heldout_samples"),
}


@dataclass(frozen=True)
class Answer:
    """A model's answer."""

    text: str
    cut: bool  # True if the token limit came before an end token


class Answerer(Protocol):
    """A model that answers questions about images."""

    @property
    def identity(self) -> dict[str, str]:
        """Everything besides the question that its answers depend on, by name."""

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[Answer]:
        """Answer the questions. Raises Unanswerable if an image cannot be decoded or a prompt cannot be tokenized."""


class HiveAnswerer:
    """Answers with a HIVE in its tokenizer's chat template; each image of a batch is encoded once."""

    def __init__(self, model: Hive, data: DataConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.data, self.dtype = model.to(device), data, dtype
        self.tokenizer = open_tokenizer(data.tokenizer)
        self.image_size: int = model.vision.config.image_size
        self.longest = model.host.longest(model.language.config)

    @cached_property
    def identity(self) -> dict[str, str]:
        transform = {name: value for name, value in asdict(self.data).items() if name not in LOADING}
        asked = key_of(identity_of_processor(self.tokenizer.stock), transform)
        return {"weights": identity(self.model), "prompts or images": asked, "precision": str(self.dtype)}

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[Answer]:
        """Answer the questions. Raises ValueError if a prompt leaves no room for an answer in the LLM's context."""
        asked = [self._prompt(one) for one in questions]
        prompts, slots = [tokens for tokens, _ in asked], [slot for _, slot in asked]
        for question, tokens in zip(questions, prompts, strict=True):
            if len(tokens) + max_tokens > self.longest:
                raise ValueError(
                    f"question {question.id} has {len(tokens)} tokens: with {max_tokens} for its answer they are more "
                    f"than the {self.longest} that the LLM takes"
                )
        images = list(dict.fromkeys(one.image for one in questions if one.image))
        places = [images.index(one.image) if one.image else None for one in questions]
        seen = [decoded(one, self._pixels) for one in images]
        device = self.model.pixel_mean.device
        pixels = torch.stack(seen or [blank(self.image_size)]).to(device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            made = generate(self.model, pixels, places, prompts, self.tokenizer.end_ids, max_tokens, slots)
        return [Answer(self.tokenizer.decode(ids).strip(), len(ids) == max_tokens) for ids in made]

    def _prompt(self, question: Question) -> tuple[list[int], int]:
        """(tokens, number of them before the image). Raises Unanswerable."""
        turns = [{"role": "user", "content": question.prompt}]
        try:
            return prompt_with_slot(turns, self.tokenizer, self.data.image_position if question.image else None)
        except ValueError as error:
            raise Unanswerable(f"question {question.id}: {error}", lambda one: one.id == question.id) from None

    def _pixels(self, data: bytes) -> Tensor:
        colour = self.model.family.mean_colour
        return to_pixels(data, self.image_size, self.data.image_transform, self.data.max_pixels, colour)


class LlavaAnswerer:
    """Answers with a stock LLaVA directory, prompted through its own processor."""

    def __init__(self, model: StockLlava) -> None:
        self.model, self.max_pixels = model, DataConfig().max_pixels

    @cached_property
    def identity(self) -> dict[str, str]:
        asked = key_of(identity_of_processor(self.model.processor), self.max_pixels)
        precision = str(self.model.model.dtype)
        return {"weights": identity(self.model.model), "prompts or images": asked, "precision": precision}

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[Answer]:
        asked = [
            (one.prompt, decoded(one.image, partial(decode, max_pixels=self.max_pixels)) if one.image else None)
            for one in questions
        ]
        return [Answer(*made) for made in self.model.answer(asked, max_tokens)]


def answer_all(
    questions: Sequence[Question],
    answerer: Answerer,
    max_tokens: int,
    folder: Path,
    world: World,
    batch_size: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> None:
    """Answer every question that has no answer in `folder`'s predictions yet, and write the answers there. A
    collective.

    Each rank appends to its own file. The files are joined at the end, or at the next start after an interruption, so
    nothing is asked twice for any number of ranks. A stored answer is reused if prompt, image and limit are unchanged;
    the caller must ensure that `folder` belongs to this answerer. A question whose image is broken gets a line that
    says so instead of an answer, and is retried by the next attempt.
    """
    asked = _Asked(max_tokens)
    due = _due(questions, folder, world, asked)
    advance(len(questions) - len(due))
    with (folder / f"predictions.{world.rank}.part").open("a", encoding="utf-8") as part:
        for batch in batches(due, batch_size)[world.rank :: world.size]:
            for question, answer in _answers(batch, answerer, max_tokens):
                line = {"id": question.id, **answer, **asked.of(question)}
                part.write(dumps(line, ensure_ascii=False) + "\n")
            part.flush()
            tick()
            advance(len(batch) * world.size)
    world.barrier()
    if world.is_main:
        _join(folder, questions, asked)
    world.barrier()


def _due(questions: Sequence[Question], folder: Path, world: World, asked: _Asked) -> list[Question]:
    """What the main rank finds is still to be answered: ranks deal it out, so all must have the same list."""
    answered: list[str] = []
    if world.is_main:
        _join(folder, questions, asked)
        answered = [id for id, line in read_predictions(folder).items() if "broken" not in line]
    known = set(world.of_main(answered))
    return [one for one in questions if one.id not in known]


def _answers(
    batch: Sequence[Question], answerer: Answerer, max_tokens: int
) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Yield each question of `batch` with its answer, or with the reason why it is broken."""
    left = list(batch)
    while left:
        try:
            answers = answerer.answer(left, max_tokens)
        except Unanswerable as error:
            for question in left:
                if error.concerns(question):
                    yield question, {"answer": "", "cut": False, "broken": str(error)}
            left = [question for question in left if not error.concerns(question)]
        else:
            for question, answer in zip(left, answers, strict=True):
                yield question, {"answer": answer.text, "cut": answer.cut}
            return


class _Asked:
    """Everything besides the model that an answer depends on, as stored in its line of the predictions."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._shown: dict[ImageFile | None, str] = {None: ""}  # hash by image; each image is read once

    def of(self, question: Question) -> dict[str, Any]:
        shown = question.image
        if shown is not None and shown not in self._shown:
            try:
                self._shown[shown] = xxhash.xxh3_64_hexdigest(shown.read())
            except (OSError, ValueError):  # the answerer reports it
                self._shown[shown] = "cannot be read"
        return {"prompt": question.prompt, "image": self._shown[shown], "max_tokens": self.max_tokens}


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Split `questions` into lists of at most `size`, keeping questions about one image together."""
    first: dict[str, int] = {}
    for place, one in enumerate(questions):
        first.setdefault(_subject(one), place)
    ordered = sorted(questions, key=lambda one: first[_subject(one)])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _subject(question: Question) -> str:
    return question.image.key if question.image else f"question {question.id}"


def read_predictions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {question id: line of its answer}. `folder` may also be the file itself."""
    path = folder if folder.is_file() else folder / PREDICTIONS
    return {line["id"]: line for line in _lines([path])}


def result(task: Task, questions: Sequence[Question], predictions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Scores of a task, and the numbers of answers that are missing (they count as wrong) or cut at the limit.

    Questions with broken images are listed under "broken", if there are any.
    """
    broken = {one.id: predictions[one.id]["broken"] for one in questions if "broken" in predictions.get(one.id, {})}
    answered = [(one, str(predictions.get(one.id, {}).get("answer", ""))) for one in questions]
    return {
        "scores": task.score(answered),
        "questions": len(questions),
        "missing": sum(one.id not in predictions or one.id in broken for one in questions),
        "cut": sum(bool(predictions.get(one.id, {}).get("cut")) for one in questions),
    } | ({"broken": broken} if broken else {})


def _join(folder: Path, questions: Sequence[Question], asked: _Asked) -> None:
    """Join all predictions into one file in the questions' order; drop answers whose prompt or image has changed.

    Answers to questions that are not asked now are kept at the end, for a later run that asks more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = sorted(folder.glob("predictions.*.part"))
    known = {line["id"]: line for line in _lines([folder / PREDICTIONS, *parts])}
    found = [(known.pop(one.id), one) for one in questions if one.id in known]
    kept = [line for line, one in found if line.items() >= asked.of(one).items()]
    joined = folder / "predictions.joined"
    lines = "".join(dumps(line, ensure_ascii=False) + "\n" for line in (*kept, *known.values()))
    joined.write_text(lines, encoding="utf-8")
    joined.replace(folder / PREDICTIONS)
    for part in parts:
        part.unlink()


def _lines(paths: Iterable[Path]) -> Iterable[dict[str, Any]]:
    for path in paths:
        lines, _ = read_lines(path)  # the second value: lines truncated by a killed process
        yield from (line for line in lines if all(isinstance(line.get(key), str) for key in ("id", "prompt", "answer")))
