"""Answers are the same in any batch and on any number of processes, no question is asked twice, none is lost; and a
score can be had again without the model."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import tars
import tiny
import torch

from hive_scale.config import DataConfig, PartConfig
from hive_scale.data.tokenizer import Tokenizer
from hive_scale.distributed import World
from hive_scale.evaluate import easyvqa
from hive_scale.evaluate.answering import (
    Answer,
    HiveAnswerer,
    LlavaAnswerer,
    answer_all,
    batches,
    read_predictions,
    result,
)
from hive_scale.evaluate.question import Question
from hive_scale.model import build
from hive_scale.model.export import export_llava
from hive_scale.model.hive import Hive
from hive_scale.model.llava import StockLlava

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))
LIMIT = 5
CHAT = (
    "{{ eos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def model() -> Hive:
    config = replace(tiny.model_config(), language=PartConfig(config=tiny.language(vocab_size=259)))
    return tiny.sighted(build.assemble(config, seed=2).eval(), 3)


def ask(folder: Path, count: int = 11) -> list[Question]:
    """Questions of ragged length about a third as many pictures, in easy-vqa's layout; the pictures come in turns."""
    images = folder / "test" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        (images / f"{number}.png").write_bytes(tars.picture_bytes(32, 32, seed=number, format="PNG"))
    asked = [[f"what is {'so ' * (i % 3)}number {i}?", "red", i % 4] for i in range(count)]
    (folder / "test" / "questions.json").write_text(json.dumps(asked))
    return easyvqa.read(folder)


class Counting:
    """A real answerer that remembers what it was asked, and may be stopped."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.asked: list[str] = []
        self.left = stop_after
        self.answerer = HiveAnswerer(model(), DataConfig(), ALONE.device)

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[Answer]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += [one.id for one in questions]
        return self.answerer.answer(questions, max_tokens)


def answers(folder: Path) -> dict[str, str]:
    return {id: line["answer"] for id, line in read_predictions(folder).items()}


def run(world: World, questions: Path, output: Path) -> list[str]:
    counting = Counting()
    answer_all(easyvqa.read(questions), counting, LIMIT, output, world, batch_size=2)
    return counting.asked


def test_any_batch_any_process_and_a_stop_between_give_the_same_answers(tmp_path: Path) -> None:
    questions = ask(tmp_path)
    one_by_one = Counting()
    expected = {q.id: one_by_one.answer([q], LIMIT)[0].text for q in questions}
    assert len(set(expected.values())) > 2, "the answers must differ, or nothing is shown"
    stopped = Counting(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        answer_all(questions, stopped, LIMIT, tmp_path / "out", ALONE, batch_size=3)
    with (tmp_path / "out" / "predictions.0.part").open("a") as part:
        part.write('{"id": "9", "prompt"')  # cut in its middle
    asked = ranks.run(run, 2, tmp_path, tmp_path / "out")
    assert asked[0]
    assert asked[1]
    assert sorted(stopped.asked + asked[0] + asked[1], key=int) == [q.id for q in questions]
    assert answers(tmp_path / "out") == expected
    assert list(answers(tmp_path / "out")) == [q.id for q in questions]
    assert run(ALONE, tmp_path, tmp_path / "out") == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.jsonl"]


def test_questions_about_one_picture_go_together(tmp_path: Path) -> None:
    cut = batches(ask(tmp_path), size=3)
    assert [len(batch) for batch in cut] == [3, 3, 3, 2]
    assert len({one.picture for one in cut[0]}) == 1


def test_an_answer_to_another_prompt_does_not_count(tmp_path: Path) -> None:
    questions = ask(tmp_path, count=2)
    answer_all(questions, Counting(), LIMIT, tmp_path / "out", ALONE, batch_size=2)
    changed = [replace(questions[0], prompt="what else?"), questions[1]]
    counting = Counting()
    answer_all(changed, counting, LIMIT, tmp_path / "out", ALONE, batch_size=2)
    assert counting.asked == ["0"]


def test_missing_and_cut_answers_are_counted(tmp_path: Path) -> None:
    questions = ask(tmp_path, count=4)
    lines = {
        "0": {"answer": "Red.", "cut": False},
        "1": {"answer": "red and then some more", "cut": True},
    }
    made = result(easyvqa.TASK, questions, lines)
    assert made == {"scores": {"accuracy": 25.0, "named": 25.0}, "questions": 4, "missing": 2, "cut": 1}


def test_a_broken_picture_costs_its_own_questions_and_is_named(tmp_path: Path) -> None:
    questions = ask(tmp_path, count=8)  # 1 and 5 are about picture 1
    expected = {q.id: Counting().answerer.answer([q], LIMIT)[0].text for q in questions}
    broken = tmp_path / "test" / "images" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-60])
    answer_all(questions, Counting(), LIMIT, tmp_path / "out", ALONE, batch_size=3)
    lines = read_predictions(tmp_path / "out")
    assert {id for id, line in lines.items() if "broken" in line} == {"1", "5"}
    assert answers(tmp_path / "out") == expected | {"1": "", "5": ""}
    made = result(easyvqa.TASK, questions, lines)
    assert (made["questions"], made["missing"]) == (8, 2)
    assert made["broken"].keys() == {"1", "5"}
    assert f"{broken}: the picture cannot be decoded" in made["broken"]["5"]
    broken.write_bytes(whole)  # mended, they are asked again, and they alone
    counting = Counting()
    answer_all(questions, counting, LIMIT, tmp_path / "out", ALONE, batch_size=3)
    assert sorted(counting.asked) == ["1", "5"]
    assert answers(tmp_path / "out") == expected
    assert "broken" not in result(easyvqa.TASK, questions, read_predictions(tmp_path / "out"))


def test_a_question_that_leaves_no_room_is_named(tmp_path: Path) -> None:
    (question,) = ask(tmp_path, count=1)
    answerer = HiveAnswerer(model(), DataConfig(), ALONE.device)
    with pytest.raises(ValueError, match=r"question 0 has \d+ tokens: with 100 for its answer .* the 128 that the LLM"):
        answerer.answer([question], 100)


def test_an_exported_llava_answers_as_the_model_it_came_from(tmp_path: Path) -> None:
    """Ours with its cache and padding on the right, transformers' with its own on the left: the same words."""
    language = tiny.language(vocab_size=259, bos_token_id=1, eos_token_id=1)
    config = replace(tiny.model_config("concat"), language=PartConfig(config=language))
    made = tiny.sighted(build.assemble(config, seed=4).eval(), 4)
    answerer = HiveAnswerer(made, DataConfig(image="pad"), ALONE.device)
    stock = answerer.tokenizer.stock
    stock.chat_template = CHAT
    answerer.tokenizer = Tokenizer(stock)
    weights = {name: parameter.detach() for name, parameter in made.named_parameters()}
    export_llava(config, weights, tmp_path / "llava", stock, "pad")
    questions = ask(tmp_path)
    other = LlavaAnswerer(StockLlava(tmp_path / "llava", ALONE.device))
    expected = [one.text for one in answerer.answer(questions, LIMIT)]
    assert len(set(expected)) > 1
    assert [one.text for one in other.answer(questions, LIMIT)] == expected


def evaluate(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The launcher's exit code, in this process."""
    monkeypatch.setattr(sys, "argv", ["launchers/evaluate.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "launchers/evaluate.py"), run_name="__main__")
    return end.value.code


def test_scores_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(tmp_path / "easyvqa", count=2)
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"id": "0", "prompt": "", "answer": "red"}) + "\n")
    assert evaluate(monkeypatch, "--tasks", "easyvqa", "--data", str(tmp_path), "--score", str(path)) == 0
    assert "50.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/none", "--tasks", "gqua"], "did you mean gqa"),
        (["runs/none", "--tasks", "easyvqa"], "runs/none is no Hugging Face directory"),
        (["--tasks", "easyvqa"], "name the model"),
        (["runs/none", "--tasks", "mme"], "no such folder"),
        (["runs/none", "--tasks", "mme", "--backend", "lmms_eval"], "lmms-eval is not installed"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    ask(tmp_path / "easyvqa", count=1)
    assert evaluate(monkeypatch, *words, "--data", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
