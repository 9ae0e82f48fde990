"""A user's own images are captioned as in training, from a run or an export, on the command line and in a browser."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from test_train import small, some_pairs  # noqa: F401  (the fixture is one of this module, too)

from hive_scale.captioner import Captioner
from hive_scale.commands import caption, demo
from hive_scale.data.conversation import prompt_with_slot
from hive_scale.distributed import session
from hive_scale.evaluate.captions import write
from hive_scale.export import export_run, processing
from hive_scale.model.generate import generate
from hive_scale.pipeline import run_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, some_pairs: None) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("captioned")
    with session() as world:
        run_pipeline(small(folder / "run"), world)
    return folder / "run"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("images"), numpy.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(random.integers(0, 256, (50, 70, 3), numpy.uint8)).save(folder / name)
    return [folder / "a.png", folder / "b.jpg"]


def test_run_stage_and_export_write_the_same(
    run: Path, images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run("hive", run, tmp_path / "hive")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    found = [Captioner.open(path, CPU) for path in (run, tmp_path / "hive", run / "joint")]
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    pixels = [found[0].read(path) for path in images]
    first = [written.text for written in found[0].write(pixels)]
    assert first == [text.strip() for text in write(found[0].model, found[0].tokenizer, pixels)]
    for other in found[1:]:
        assert [written.text for written in other.write([other.read(path) for path in images])] == first
    content = json.loads((tmp_path / "hive" / "config.json").read_text())
    content["data"]["image_transform"] = "twist"
    (tmp_path / "hive" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image_transform"):
        processing(tmp_path / "hive")


def test_an_export_whose_config_was_made_up_is_refused(run: Path, tmp_path: Path) -> None:
    export_run("hive", run, tmp_path / "hive")
    (tmp_path / "hive" / "hive_scale.sha256").unlink()  # a stranger's own would fit
    path = tmp_path / "hive" / "config.json"
    content = path.read_text()
    for key, value in {
        **{"model.vision.path": 5, "model.language.path": "../other", "model.language.config": -1, "data": 0},
        **{"model.qk_norm": True, "model": [], "model.language.config.intermediate_size": 8},
        **{"model.vision.config.hidden_size": 10**9, "model.fusion": ["concat"], "data.max_tokens": "many"},
    }.items():
        changed = json.loads(content)
        *above, last = key.split(".")
        place = changed
        for name in above:
            place = place[name]
        place[last] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"\w"):
            Captioner.open(tmp_path / "hive", CPU)
    path.write_text(content)
    Captioner.open(tmp_path / "hive", CPU)


def test_a_caption_goes_on_from_its_beginning_and_a_question_is_asked_in_the_chat_template(
    run: Path, images: list[Path]
) -> None:
    captioner = Captioner.open(run, CPU)
    pixels = torch.stack([captioner.read(images[0])])
    tokenizer, ends = captioner.tokenizer, captioner.tokenizer.end_ids
    (written,) = captioner.write(list(pixels), "a red", max_tokens=6)
    start = tokenizer.encode("a red", 99)[:-1]
    (after,) = generate(captioner.model, pixels, [0], [start], ends, 6)
    assert (written.ids, written.text) == (after, tokenizer.decode([*start, *after]).strip())
    assert written.text.startswith("a red")
    captioner.data = replace(captioner.data, format="conversation")
    (written,) = captioner.write(list(pixels), "What is it?", max_tokens=6)
    asked, slot = prompt_with_slot([{"role": "user", "content": "What is it?"}], tokenizer, "user")
    (after,) = generate(captioner.model, pixels, [0], [asked], ends, 6, [slot])
    assert (written.ids, written.text) == (after, tokenizer.decode(after).strip())


def test_the_attention_of_a_word_is_that_of_its_own_tokens(run: Path, images: list[Path]) -> None:
    captioner = Captioner.open(run, CPU)
    image = captioner.read(images[0])
    (written,) = captioner.write([image], "red", max_tokens=4)
    written = replace(written, ids=captioner.tokenizer.encode(" cat red", 99)[1:-1])
    assert captioner.words(written) == ["cat", "red"]  # the prompt's own is none of them
    ids = torch.tensor([[*written.prompt_ids, *written.ids]])
    shown = captioner.attention(image, written, 1)
    assert shown.words == ["red"]
    for layer, (weights,) in shown.maps.items():
        whole = captioner.model.attention(captioner.model.encode_images(image[None]), ids, [layer - 1])[layer - 1]
        last = whole[0].mean(0)[-3:].mean(0)  # three bytes
        torch.testing.assert_close(weights, last / last.sum())


def say(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["caption", *map(str, words)])
    return caption.main()


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_captioned(
    run: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken\x1b[2J.jpg"
    broken.write_text("no image")
    assert say(monkeypatch, run, images[0], broken, images[1]) == 2
    said, errors = capsys.readouterr()
    assert [line.split(": ")[0] for line in said.splitlines()[-2:]] == [str(path) for path in images]
    assert "\x1b" not in errors
    assert "it is no JPEG, PNG or WebP" in errors
    assert "1 of 3 images could not be read" in errors
    assert say(monkeypatch, run, *images) == 0
    near = images[0].with_name(f"{images[0].stem}x{images[0].suffix}")
    assert say(monkeypatch, run, near, images[0].parent) == 2
    errors = capsys.readouterr().err
    assert f"{near} is not there: did you mean {images[0]}?" in errors
    assert f"{images[0].parent} is a folder: give the files in it, such as {images[0].parent}/*.jpg" in errors


def test_what_is_no_image_file_is_not_read(run: Path, images: list[Path], tmp_path: Path) -> None:
    captioner = Captioner.open(run, CPU)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with (tmp_path / "huge.jpg").open("wb") as huge:
        huge.truncate(2**40)
    for name in ("pipe.jpg", "folder.jpg", "huge.jpg", "missing.jpg", "/dev/zero"):
        with pytest.raises(ValueError, match=Path(name).name):
            captioner.read(tmp_path / name)
    with pytest.raises(ValueError, match="UTF-8"):
        captioner.write([captioner.read(images[0])], "a \udcff")


def test_what_writes_no_captions_is_refused_by_name(
    run: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = next(run.glob("*/encoder"))
    assert say(monkeypatch, encoder, images[0]) == 2
    assert (
        "encoder is not an exported HIVE: it holds a siglip_vision_model, not a whole HIVE" in capsys.readouterr().err
    )
    assert say(monkeypatch, tmp_path / "none", images[0]) == 2
    assert "none" in capsys.readouterr().err
    assert say(monkeypatch, run, images[0], "--max_tokens", 0) == 2
    assert "--max_tokens 0 must be at least 1" in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setattr(Captioner, "open", lambda *_: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr("sys.argv", ["demo", str(run), "--port", port])
        assert demo.main() == 2
    assert f"--port {port} cannot be used (" in capsys.readouterr().err


def test_the_page_captions_an_image_and_shows_the_attention_of_a_word(
    browser: Any, run: Path, images: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("gradio")
    from hive_scale.commands.demo import page

    damaged = tmp_path / "damaged.png"
    Image.effect_noise((64, 64), 80).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:2000])

    captioner = Captioner.open(run, CPU)
    asked: list[str] = []
    (written,) = captioner.write([captioner.read(images[0])], "a red cat")
    served = page(captioner, "run")
    _, address, _ = served.launch(server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True)
    try:
        view = browser.new_page()
        view.set_default_timeout(60_000)
        view.on("request", lambda request: asked.append(request.url))
        view.goto(address)
        view.set_input_files("input[type=file]", images[0])
        view.get_by_label("Beginning of the caption").fill("a red cat")
        view.wait_for_selector("img")
        view.get_by_role("button", name="Write a caption").click()
        view.wait_for_function(
            "text => [...document.querySelectorAll('textarea')].some(one => one.value == text)", arg=written.text
        )
        view.get_by_role("radio").first.click()  # it waits for the words
        assert view.get_by_role("radio").count() == len(captioner.words(written))
        maps = view.locator("svg", has_text="layer")
        maps.wait_for()
        assert all(f"layer {layer + 1}" in maps.text_content() for layer in captioner.model.visual_layers())
        view.get_by_label("Beginning of the caption").fill("red " * 2000)
        view.get_by_role("button", name="Write a caption").click()
        view.get_by_text("the LLM takes").wait_for()  # the error, as the command says it
        view.reload()
        view.set_input_files("input[type=file]", damaged)
        view.wait_for_selector("img")
        view.get_by_role("button", name="Write a caption").click()
        view.get_by_text("image file is truncated").wait_for()
        assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
    finally:
        served.close()
