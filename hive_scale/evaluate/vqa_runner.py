"""A task's questions put to a model: in batches, over all ranks, and never twice."""

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
from hive_scale.strict_json import dumps, loads, read_lines

PREDICTIONS = "predictions.jsonl"
# of a run's data: which samples there are and how they come, not what is made of an image and its prompt
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
    "max_bad_samples",
}


@dataclass(frozen=True)
class Answer:
    text: str
    cut: bool  # the limit came before the end


class Answerer(Protocol):
    @property
    def identity(self) -> dict[str, str]:
        """What its answers depend on besides the question, each by name."""

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[Answer]:
        """Raises Unanswerable if one of the images cannot be decoded, or one of the texts not be put to the model."""


class HiveAnswerer:
    """A model of ours, asked in its tokenizer's chat template; each image of a batch is seen once."""

    def __init__(self, model: Hive, data: DataConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.data, self.dtype = model.to(device), data, dtype
        self.tokenizer = open_tokenizer(data.tokenizer)
        self.image_size: int = model.vision.config.image_size
        self.longest: int = model.language.config.max_position_embeddings

    @cached_property
    def identity(self) -> dict[str, str]:
        transform = {name: value for name, value in asdict(self.data).items() if name not in LOADING}
        asked = key_of(identity_of_processor(self.tokenizer.stock), transform)
        return {"weights": identity(self.model), "prompts or images": asked, "precision": str(self.dtype)}

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[Answer]:
        """Raises ValueError for a prompt that leaves an answer no room in the LLM's context."""
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
        """Tokens, and how many of them come before the image. Raises Unanswerable."""
        turns = [{"role": "user", "content": question.prompt}]
        try:
            return prompt_with_slot(turns, self.tokenizer, self.data.image_position if question.image else None)
        except ValueError as error:
            raise Unanswerable(f"question {question.id}: {error}", lambda one: one.id == question.id) from None

    def _pixels(self, data: bytes) -> Tensor:
        colour = self.model.family.mean_colour
        return to_pixels(data, self.image_size, self.data.image_transform, self.data.max_pixels, colour)


class LlavaAnswerer:
    """A stock LLaVA directory, asked as its own processor asks."""

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
    """Put to `answerer` every question that `folder`'s predictions have no answer to, and write them there.

    A collective. Ranks append to files of their own, which are joined at the end, and at the beginning if an
    earlier attempt was stopped: nothing is asked twice, whatever the number of ranks then and now. An answer counts if
    prompt, image and limit are the same; whose answers `folder` holds is the caller's to know. A question whose
    image is broken gets a line that says so in place of an answer, and is tried again by the next attempt.
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
    known = set(loads(world.of_main(dumps(answered))))
    return [one for one in questions if one.id not in known]


def _answers(
    batch: Sequence[Question], answerer: Answerer, max_tokens: int
) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Each question of `batch` with its answer, or with what is wrong with it."""
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
    """What an answer depends on besides the model, as its line in the predictions says it."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._shown: dict[ImageFile | None, str] = {None: ""}  # by image, of which each is read once

    def of(self, question: Question) -> dict[str, Any]:
        shown = question.image
        if shown is not None and shown not in self._shown:
            try:
                self._shown[shown] = xxhash.xxh3_64_hexdigest(shown.read())
            except (OSError, ValueError):  # who answers will say so
                self._shown[shown] = "cannot be read"
        return {"prompt": question.prompt, "image": self._shown[shown], "max_tokens": self.max_tokens}


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """`questions` cut into lists of at most `size`, those about one image side by side."""
    first: dict[str, int] = {}
    for place, one in enumerate(questions):
        first.setdefault(_subject(one), place)
    ordered = sorted(questions, key=lambda one: first[_subject(one)])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _subject(question: Question) -> str:
    return question.image.key if question.image else f"question {question.id}"


def read_predictions(folder: Path) -> dict[str, dict[str, Any]]:
    """Question's id -> line of its answer. `folder` may be the file itself."""
    path = folder if folder.is_file() else folder / PREDICTIONS
    return {line["id"]: line for line in _lines([path])}


def result(task: Task, questions: Sequence[Question], predictions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Scores of a task, and how many answers are missing (they count as wrong) or were cut at the limit.

    Those that are missing for a broken image are named under "broken", where there are any.
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
    """One file of predictions, in the questions' order; answers to other prompts or images than today's are dropped.

    Questions that are not among today's keep their answers, behind the others: another day more may be asked.
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
        lines, _ = read_lines(path)  # and those that a killed process has cut, in the middle of a letter perhaps
        yield from (line for line in lines if all(isinstance(line.get(key), str) for key in ("id", "prompt", "answer")))
