"""The command that gives an encoder to a chat LLM: both stages, the resulting stock directory, its answers; and
mistakes are reported before training, not between its stages.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tars
import tiny

from hive_scale.checkpoint.weights import read_weights
from hive_scale.commands import evaluate, finetune_vlm
from hive_scale.prepare import easyvqa

REFUSES = "{{ raise_exception('no chat') }}"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stock_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen questions in easy-vqa's layout."""
    root = tmp_path_factory.mktemp("data")
    write_questions(root / "easyvqa")
    return root


def write_questions(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "images").mkdir(parents=True)
        for number in range(4):
            image = tars.image_bytes(64, 64, seed=number, format="PNG")
            (folder / split / "images" / f"{number}.png").write_bytes(image)
        asked = [[f"is there a {shape}?", "yes", number] for number in range(4) for shape in ("circle", "box", "star")]
        (folder / split / "questions.json").write_text(json.dumps(asked))
    easyvqa.conversations(folder)


def recipe(folder: Path, shards: str) -> Path:
    """`vlm_small` with a toy for an LLM, two steps a stage."""
    few = {"max_steps": 2, "global_batch": 4, "micro_batch": 4}
    llm = tiny.language(vocab_size=259, bos_token_id=1, eos_token_id=1, max_position_embeddings=256)
    content = {
        "preset": "vlm_small",
        "model": {"language": {"path": "", "config": llm}},
        "data": {"train": [shards], "heldout": [shards], "tokenizer": {"path": "bytes"}, "max_tokens": 200},
        "stages": {"connector": few, "language": few},
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))  # which is YAML, too
    return file


def test_both_stages_and_a_stock_llava_that_answers_as_the_run_does(
    encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [str(encoder), "--config", str(recipe(tmp_path, f"{data}/easyvqa/train-*.tar")), f"output={run}"]
    assert finetune_vlm.main(words) == 0
    assert f"model    {run}/llava" in capsys.readouterr().out
    first, last = read_weights(run / "connector"), read_weights(run / "language")
    initial = read_weights(run / "initial")
    for name in last:
        part = name.split(".")[0]
        assert initial[name].equal(first[name]) == (part != "projector")
        assert first[name].equal(last[name]) == (part == "vision")
    made = json.loads((run / "llava" / "config.json").read_text())
    assert made["architectures"] == ["LlavaForConditionalGeneration"]
    for model in (run, run / "llava"):
        asked = [str(model), "--tasks", "easyvqa", "--data", str(data), "--output", str(tmp_path / model.name)]
        assert evaluate.main([*asked, "--max_tokens", "3"]) == 0
    told, again = ((tmp_path / name / "easyvqa/predictions.jsonl").read_text() for name in ("run", "llava"))
    assert told == again
    assert told.count("\n") == 12
    assert finetune_vlm.main(words) == 0, "again, nothing is left to do"


def test_the_llm_only_leaves_the_connector_as_it_is(encoder: Path, data: Path, tmp_path: Path) -> None:
    words = ["--config", str(recipe(tmp_path, f"{data}/easyvqa/train-*.tar")), f"output={tmp_path / 'run'}"]
    assert finetune_vlm.main([str(encoder), *words, "llm_only=true", "--quiet"]) == 0
    first, last = (read_weights(tmp_path / "run" / stage) for stage in ("connector", "language"))
    assert {name.split(".")[0] for name in last if not first[name].equal(last[name])} == {"language"}


def several(folder: Path) -> str:
    """Shards whose conversations are about two images each."""
    said = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "the first"}]
    record = json.dumps({"conversations": said}).encode()
    return tars.write_tar(folder / "two.tar", [(str(i), tars.pair(i) | {"json": record}) for i in range(4)])


def another_size(encoder: Path, folder: Path) -> Path:
    for file in encoder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["size"] = {"height": 48, "width": 48}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no encoder", "is no Hugging Face directory"),
        ("two images", "the conversation is about 2 images: only one is supported"),
        ("a template", "the tokenizer's chat template refuses a conversation of user and assistant"),
        ("a processor", "its processor makes images of 48 pixels, its encoder takes 32"),
        ("a shape", "does not fit this model: of another shape"),
        ("a typo", "did you mean language"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    encoder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    message: str,
) -> None:
    shards, words, path = f"{data}/easyvqa/train-*.tar", [f"output={tmp_path / 'run'}"], encoder
    if what == "no encoder":
        path = tmp_path
    elif what == "two images":
        shards = several(tmp_path)
    elif what == "a template":
        monkeypatch.setattr("hive_scale.chat_template.CHAT_TEMPLATE", REFUSES)
    elif what == "a processor":
        path = another_size(encoder, tmp_path)
    elif what == "a shape":
        words.append(f"model.vision.config={json.dumps(tiny.SIGLIP | {'image_size': 48})}")
    else:
        words.append("stages.langage.max_steps=1")
    assert finetune_vlm.main([str(path), "--config", str(recipe(tmp_path, shards)), *words]) == 2
    *warnings, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert not any(line.startswith(("error", " ", "Traceback")) for line in warnings), warnings
    assert message in said
    assert not (tmp_path / "run" / "connector").exists()
