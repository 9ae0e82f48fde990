"""Answers are the same in any batch and on any number of processes, no question is asked twice, none is lost; and a
score can be computed again without the model.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import tars
import tiny
import torch
from safetensors.torch import load_file

from hive_scale.commands import evaluate as command
from hive_scale.config import DataConfig, PartConfig
from hive_scale.data.tokenizer import Tokenizer
from hive_scale.distributed import World
from hive_scale.evaluate import easyvqa
from hive_scale.evaluate.vqa_runner import (
    Answer,
    HiveAnswerer,
    LlavaAnswerer,
    answer_all,
    batches,
    read_predictions,
    result,
)
from hive_scale.evaluate.vqa_types import Question
from hive_scale.export.huggingface import export_llava
from hive_scale.model import build
from hive_scale.model.hive import Hive
from hive_scale.model.llava import StockLlava
from hive_scale.resilience.run_lock import locked

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
    return tiny.sighted(build.init_model(config, seed=2).eval(), 3)


def ask(folder: Path, count: int = 11) -> list[Question]:
    """Questions of ragged length about a third as many images, in easy-vqa's layout; the images come in turns."""
    images = folder / "test" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        (images / f"{number}.png").write_bytes(tars.image_bytes(32, 32, seed=number, format="PNG"))
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


def test_lines_that_a_kill_or_a_hand_has_spoiled_are_asked_again(tmp_path: Path) -> None:
    questions, out = ask(tmp_path, count=4), tmp_path / "out"
    answer_all(questions, Counting(), LIMIT, out, ALONE, batch_size=4)
    expected, path = answers(out), out / "predictions.jsonl"
    first, second, *rest = path.read_text().splitlines(keepends=True)
    spoiled = [
        json.dumps(json.loads(second) | {"answer": None}),
        '{"id": [1], "prompt": {}, "answer": []}',
        "[1]",
        "\0" * 99,
    ]
    path.write_text("\n".join([first, *spoiled, *rest]))
    (out / "predictions.3.part").write_bytes('{"id": "9", "answer": "é'.encode()[:-1])  # cut in a letter
    counting = Counting()
    answer_all(questions, counting, LIMIT, out, ALONE, batch_size=4)
    assert counting.asked == ["1"]
    assert answers(out) == expected


def test_questions_about_one_image_go_together(tmp_path: Path) -> None:
    cut = batches(ask(tmp_path), size=3)
    assert [len(batch) for batch in cut] == [3, 3, 3, 2]
    assert len({one.image for one in cut[0]}) == 1


def test_an_answer_to_another_prompt_does_not_count(tmp_path: Path) -> None:
    questions = ask(tmp_path, count=2)
    answer_all(questions, Counting(), LIMIT, tmp_path / "out", ALONE, batch_size=2)
    changed = [replace(questions[0], prompt="what else?"), questions[1]]
    counting = Counting()
    answer_all(changed, counting, LIMIT, tmp_path / "out", ALONE, batch_size=2)
    assert counting.asked == ["0"]


def test_an_answer_of_another_limit_or_about_another_image_does_not_count(tmp_path: Path) -> None:
    questions = ask(tmp_path, count=8)
    answer_all(questions, Counting(), LIMIT, tmp_path / "out", ALONE, batch_size=8)
    images = tmp_path / "test" / "images"
    (images / "1.png").write_bytes(tars.image_bytes(32, 32, seed=9, format="PNG"))
    counting = Counting()
    answer_all(questions, counting, LIMIT, tmp_path / "out", ALONE, batch_size=8)
    assert counting.asked == ["1", "5"]
    counting = Counting()
    answer_all(questions, counting, LIMIT - 1, tmp_path / "out", ALONE, batch_size=8)
    assert sorted(counting.asked) == [question.id for question in questions]


def test_asking_fewer_keeps_the_answers_to_the_others(tmp_path: Path) -> None:
    questions = ask(tmp_path, count=6)
    answer_all(questions, Counting(), LIMIT, tmp_path / "out", ALONE, batch_size=3)
    before = answers(tmp_path / "out")
    for some in (questions[2:4], questions):
        answer_all(some, Counting(stop_after=0), LIMIT, tmp_path / "out", ALONE, batch_size=3)
        assert answers(tmp_path / "out") == before
    assert list(answers(tmp_path / "out")) == [question.id for question in questions]


def test_missing_and_cut_answers_are_counted(tmp_path: Path) -> None:
    questions = ask(tmp_path, count=4)
    lines = {
        "0": {"answer": "Red.", "cut": False},
        "1": {"answer": "red and then some more", "cut": True},
    }
    made = result(easyvqa.TASK, questions, lines)
    assert made == {"scores": {"accuracy": 25.0, "named": 25.0}, "questions": 4, "missing": 2, "cut": 1}


def test_a_question_that_spells_a_special_token_costs_itself_alone(tmp_path: Path) -> None:
    questions = [replace(one, prompt="is </s> red?") if i == 2 else one for i, one in enumerate(ask(tmp_path))]
    answer_all(questions, Counting(), LIMIT, tmp_path / "out", ALONE, batch_size=4)
    lines = read_predictions(tmp_path / "out")
    assert [id for id, line in lines.items() if "broken" in line] == [questions[2].id]
    assert "special token </s>" in lines[questions[2].id]["broken"]
    assert len(lines) == len(questions)


def test_a_broken_image_costs_its_own_questions_and_is_named(tmp_path: Path) -> None:
    questions = ask(tmp_path, count=8)  # 1 and 5 are about image 1
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
    assert f"{broken}: the image cannot be decoded" in made["broken"]["5"]
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


def exported(folder: Path) -> HiveAnswerer:
    """The answerer of a model that lies in `folder` as a stock LLaVA."""
    language = tiny.language(vocab_size=259, bos_token_id=1, eos_token_id=1)
    config = replace(tiny.model_config("concat"), language=PartConfig(config=language))
    made = tiny.sighted(build.init_model(config, seed=4).eval(), 4)
    answerer = HiveAnswerer(made, DataConfig(image_transform="pad"), ALONE.device)
    stock = answerer.tokenizer.stock
    stock.chat_template = CHAT
    answerer.tokenizer = Tokenizer(stock)
    weights = {name: parameter.detach() for name, parameter in made.named_parameters()}
    export_llava(config, weights, folder, stock, "pad")
    return answerer


def test_an_exported_llava_answers_as_the_model_it_came_from(tmp_path: Path) -> None:
    """Ours with its cache and padding on the right, transformers' with its own on the left: the same words."""
    answerer = exported(tmp_path / "llava")
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


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llava"
    exported(folder)
    return folder


def ask_mme(folder: Path) -> None:
    """Two images with two questions each, as MME is released."""
    for name in ("1", "2"):
        (folder / "count").mkdir(parents=True, exist_ok=True)
        (folder / "count" / f"{name}.png").write_bytes(tars.image_bytes(32, 32, seed=int(name), format="PNG"))
        (folder / "count" / f"{name}.txt").write_text("Is there one?\tYes\nAre there two?\tNo\n")


def scores(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_a_task_that_has_ended_has_its_scores_whatever_becomes_of_the_next(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path / "easyvqa", count=5)
    ask_mme(tmp_path / "mme")
    output, asked = tmp_path / "out", []
    answer = LlavaAnswerer.answer

    def once(self: LlavaAnswerer, questions: Sequence[Question], max_tokens: int) -> list[Answer]:
        if asked:
            raise KeyboardInterrupt
        asked.extend(questions)
        return answer(self, questions, max_tokens)

    words = [str(llava), "--data", str(tmp_path), "--output", str(output), "--max_tokens", "2", "--tasks"]
    monkeypatch.setattr(LlavaAnswerer, "answer", once)
    assert command.main([*words, "easyvqa,mme"]) == 75
    first = scores(output)
    assert list(first) == ["easyvqa"]
    assert first["easyvqa"]["questions"] == len(asked) == 5
    monkeypatch.setattr(LlavaAnswerer, "answer", answer)
    assert command.main([*words, "mme", "--limit", "1"]) == 0
    both = scores(output)
    assert both.pop("mme")["questions"] == 2, "the other question about the image is asked, too"
    assert both == first
    (output / "results.json").write_text(json.dumps(both)[:-5])  # cut by what we do not know
    assert command.main([*words, "easyvqa,mme"]) == 0
    assert scores(output)["easyvqa"] == first["easyvqa"]
    assert scores(output)["mme"]["questions"] == 4
    assert not list(output.rglob("*.tmp"))


@pytest.mark.parametrize("held", ["[]", "null", "3", '"x"', ""])
def test_results_that_a_hand_has_spoiled_are_written_anew(llava: Path, tmp_path: Path, held: str) -> None:
    ask(tmp_path / "easyvqa", count=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(held)
    words = ["--tasks", "easyvqa", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--max_tokens", "1"]
    assert command.main([str(llava), *words]) == 0
    assert list(scores(tmp_path / "out")) == ["easyvqa"]


def test_two_at_once_take_no_answers_from_each_other(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second start would join the first one's answers, and remove the file that it still writes to."""
    ask(tmp_path / "easyvqa", count=1)
    words = ["--tasks", "easyvqa", "--data", str(tmp_path), "--max_tokens", "1", "--output", str(tmp_path / "out")]
    with locked(tmp_path / "out", ALONE):
        assert command.main([str(llava), *words]) == 75
        assert f"{tmp_path}/out is in use by" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert command.main([str(llava), *words]) == 0


def test_a_question_that_spells_the_images_token_is_asked_of_anyones_llava(llava: Path, tmp_path: Path) -> None:
    """Whose template, unlike ours, does not leave it out: it would be a second image, and end the evaluation."""
    shutil.copytree(llava, tmp_path / "llava")
    template = (
        "{{ eos_token }}{% for m in messages %}{% for part in m.content %}{{ part.text or '<image>' }}{% endfor %}"
    )
    (tmp_path / "llava" / "chat_template.jinja").write_text(template + "{{ eos_token }}{% endfor %}")
    answerer = LlavaAnswerer(StockLlava(tmp_path / "llava", ALONE.device))
    plain = replace(ask(tmp_path, count=1)[0], prompt="what does mean?")
    spelt = [replace(plain, prompt=f"what does {one}mean?") for one in ("<image>", "<ima<image>ge>")]
    assert answerer.answer([plain, *spelt], LIMIT) == answerer.answer([plain], LIMIT) * 3


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def other_weights(folder: Path) -> None:
    """As .bin, which is read as well."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: 2 * tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))


def other_end(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 9}))


def other_images(folder: Path) -> None:
    path = folder / "processor_config.json"
    if not path.exists():
        path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    held = config.get("image_processor", config)
    held["image_mean"] = [0.1, 0.1, 0.1]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "words", "what"),
    [
        (other_weights, [], "weights"),
        (other_config, [], "weights"),
        (other_end, [], "weights"),
        (other_template, [], "prompts or images"),
        (other_images, [], "prompts or images"),
        (lambda folder: None, ["--precision", "bf16"], "weights, precision"),
    ],
)
def test_answers_of_another_model_or_precision_are_refused(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, words: list[str], what: str
) -> None:
    ask(tmp_path / "easyvqa", count=1)
    model = tmp_path / "model"
    shutil.copytree(llava, model)
    asked = ["--data", str(tmp_path), "--tasks", "easyvqa", "--output", str(tmp_path / "out"), "--max_tokens", "1"]
    for same in (llava, model):  # a copy of a model is the same model
        assert command.main([str(same), *asked]) == 0
    change(model)
    capsys.readouterr()
    assert command.main([str(model), *asked, *words]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/out holds answers of other {what}: give --output DIR, or delete it" in said


def test_a_model_of_ours_is_known_by_how_it_reads_images_and_by_its_weights() -> None:
    plain = HiveAnswerer(model(), DataConfig(), ALONE.device)
    assert HiveAnswerer(model(), DataConfig(workers=3), ALONE.device).identity == plain.identity
    others = [
        HiveAnswerer(tiny.sighted(model(), 2), DataConfig(), ALONE.device),
        HiveAnswerer(model(), DataConfig(image_transform="pad"), ALONE.device),
        HiveAnswerer(model(), DataConfig(), ALONE.device, torch.bfloat16),
    ]
    changed = [{what for what in plain.identity if one.identity[what] != plain.identity[what]} for one in others]
    assert changed == [{"weights"}, {"prompts or images"}, {"precision"}]


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
        (["runs/none", "--tasks", "easyvqa"], "runs/none is not there"),
        (["--tasks", "easyvqa"], "name the model"),
        (["runs/none", "--tasks", "easyvqa", "--limit", "0"], "--limit 0 must be at least 1"),
        (["runs/none", "--tasks", "easyvqa", "--limit", "-1"], "--limit -1 must be at least 1"),
        (["--tasks", "easyvqa,easyvqa", "--score", __file__], "predictions are of one task"),
        (["runs/none", "--tasks", "mme"], "no such folder"),
        (["runs/none", "--tasks", "mme", "--backend", "lmms_eval"], "lmms_eval is not installed"),
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
