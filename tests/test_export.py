"""Exports equal what was trained: other libraries' classes load them, without ours, to the same numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train import small, some_pairs  # noqa: F401  (the fixture is one of this module, too)
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from hive_scale.checkpoint.run_reader import Run
from hive_scale.checkpoint.weights import read_weights, write_weights
from hive_scale.commands.export import main
from hive_scale.config import Config, ModelConfig, PartConfig, TokenizerConfig
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.distributed import session
from hive_scale.export import export_run, from_pretrained, huggingface, save_pretrained
from hive_scale.model.build import init_model, load_model
from hive_scale.model.hive import Hive
from hive_scale.pipeline import run_pipeline
from hive_scale.shared_files import locked, own_lock

pytestmark = pytest.mark.contract
NUM_VISUAL = (tiny.IMAGE // tiny.SIGLIP["patch_size"]) ** 2
TEXT = "two red kites"
BYTES = open_tokenizer(TokenizerConfig()).stock


def open_gates(model: Hive) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.5)


def sample_image() -> Image.Image:
    pixels = numpy.random.default_rng(0).integers(0, 256, (tiny.IMAGE, tiny.IMAGE, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None]


def model_config(fusion: Any, tower: dict[str, Any], llm: str, **changes: Any) -> ModelConfig:
    language = tiny.language(llm, **{"vocab_size": 259, **changes})
    return ModelConfig(PartConfig(config=tower), PartConfig(config=language), fusion=fusion, encoder_layer_ratio=0.5)


@pytest.mark.parametrize(
    ("tower", "mode", "llm", "changes"),
    [
        (tiny.SIGLIP, "resize", "llama", {}),
        (tiny.CLIP, "crop", "qwen2", {"tie_word_embeddings": False}),
        (tiny.SIGLIP, "pad", "qwen3", {"vocab_size": 300}),
    ],
)
@torch.no_grad()
def test_the_baseline_is_a_llava(tmp_path: Path, tower: Any, mode: Any, llm: str, changes: dict[str, Any]) -> None:
    config = model_config("concat", tower, llm, **changes)
    ours = init_model(config, seed=5).eval()
    huggingface.export_llava(config, dict(ours.named_parameters()), tmp_path, BYTES, mode)
    llava, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = sample_image()
    inputs = processor(images=image, text=f"</s><image>{TEXT}", add_special_tokens=False, return_tensors="pt")
    tokens = torch.tensor([[1, *BYTES.encode(TEXT, add_special_tokens=False)]])
    assert inputs.input_ids.shape[1] == NUM_VISUAL + tokens.shape[1]
    theirs = llava.eval()(**inputs).logits
    expected = ours.logits(ours.language_forward(ours.encode_images(pixels_of(image)), tokens))
    found = theirs[:, NUM_VISUAL:, : expected.shape[-1]]  # from the last visual token on, which predicts the first word
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    plain = llava(input_ids=tokens).logits[..., : expected.shape[-1]]  # the image counts
    assert (plain - expected).abs().max() > 1e-3
    llava.generation_config.suppress_tokens += [t for t in range(3, 259) if t != 70]
    prompt = {key: value[:, : 1 + NUM_VISUAL] if key != "pixel_values" else value for key, value in inputs.items()}
    written = llava.generate(**prompt, max_new_tokens=5, do_sample=False)[0, 1 + NUM_VISUAL :]
    assert processor.tokenizer.convert_tokens_to_ids("<image>") not in written


def test_other_fusions_are_no_llava(tmp_path: Path) -> None:
    config = model_config("cross_attention", tiny.SIGLIP, "llama")
    with pytest.raises(ValueError, match="train with fusion=concat"):
        huggingface.export_llava(config, {}, tmp_path, None, "resize")


@torch.no_grad()
def test_encoder_and_llm_leave_as_stock_directories(tmp_path: Path) -> None:
    config = model_config("cross_attention", tiny.CLIP, "qwen3")
    ours = init_model(config, seed=5).eval()
    weights, image = dict(ours.named_parameters()), sample_image()
    huggingface.export_encoder(config, weights, tmp_path / "encoder", "crop")
    huggingface.export_llm(config, weights, tmp_path / "llm", BYTES)
    encoder = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "encoder")(images=image, return_tensors="pt")
    normalised = (pixels_of(image).float() - ours.pixel_mean) / ours.pixel_std
    torch.testing.assert_close(inputs["pixel_values"], normalised, atol=1e-5, rtol=0)
    found, expected = (tower(normalised, output_hidden_states=True) for tower in (encoder, ours.vision))
    torch.testing.assert_close(found.hidden_states[-2], expected.hidden_states[-2], atol=1e-5, rtol=0)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "llm")(TEXT, return_tensors="pt").input_ids
    torch.testing.assert_close(llm(ids).logits, ours.language(ids).logits, atol=1e-5, rtol=0)
    huggingface.export_llm(config, weights, tmp_path / "half", BYTES, torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("fusion", ["cross_attention", "joint_attention", "concat"])
@torch.no_grad()
def test_a_hive_comes_back_without_the_directories_it_was_made_from(tmp_path: Path, fusion: str) -> None:
    config = model_config("concat", tiny.CLIP, "llama")
    weights = dict(init_model(config, seed=5).named_parameters())
    huggingface.export_encoder(config, weights, tmp_path / "encoder", "crop")
    huggingface.export_llm(config, weights, tmp_path / "llm", BYTES)
    parts = PartConfig(str(tmp_path / "encoder")), PartConfig(str(tmp_path / "llm"))
    config = ModelConfig(*parts, fusion=fusion, encoder_layer_ratio=0.5)  # type: ignore[arg-type]
    ours = init_model(config, seed=6)
    open_gates(ours)
    write_weights(tmp_path / "w.safetensors", dict(ours.named_parameters()))
    run = Config(model=config)
    save_pretrained(run, read_weights(tmp_path / "w.safetensors"), tmp_path / "hive")
    save_pretrained(run, read_weights(tmp_path / "w.safetensors"), tmp_path / "half", torch.bfloat16)
    shutil.rmtree(tmp_path / "encoder")
    shutil.rmtree(tmp_path / "llm")
    batch = tiny.batch(2)
    assert torch.equal(from_pretrained(tmp_path / "hive")(**batch.inputs()), ours.eval()(**batch.inputs()))
    assert {p.dtype for p in from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hive")) == 259
    with pytest.raises(ValueError, match="not an exported HIVE"):
        from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, some_pairs: None) -> Iterator[Path]:  # noqa: F811
    config = small(tmp_path_factory.mktemp("run") / "run", steps=1)
    with session() as world:
        run_pipeline(config, world)
        yield config.run_dir


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, words)])
    return main()


def test_a_run_gives_its_parts_away_with_a_card(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("encoder", "llm", "hive"):
        assert command(monkeypatch, kind, run, "--output", tmp_path / kind, "--stage", "language") == 0
        card = (tmp_path / kind / "README.md").read_text()
        assert "| language | 1 |" in card
        assert "| joint | 1 |" not in card
        assert r"| fusion | cross\_attention, 50% of the encoder's depths, uniform |" in card
        assert read_weights(run / "language" / "weights.safetensors").identity in card
    config = small(run).model
    ours = load_model(config, read_weights(run / "language"))
    assert torch.equal(from_pretrained(tmp_path / "hive")(**tiny.batch().inputs()), ours(**tiny.batch().inputs()))
    assert command(monkeypatch, "encoder", run) == 0
    assert (run / "export" / "encoder" / "model.safetensors").exists()
    assert command(monkeypatch, "encoder", run) == 2  # it would overwrite
    assert command(monkeypatch, "llava", run, "--output", tmp_path / "llava") == 2
    assert command(monkeypatch, "llm", run, "--output", tmp_path / "x", "--stage", "other") == 2
    assert command(monkeypatch, "llm", tmp_path) == 2
    errors = capsys.readouterr().err.splitlines()
    for error, part in zip(errors, ("exists", "not a LLaVA", "still to be done", "not a run"), strict=True):
        assert error.startswith("error: ")
        assert part in error
    assert not (tmp_path / "llava").exists()


def test_torch_alone_loads_the_distributed_checkpoint_as_its_card_says(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "dcp"
    export_run("dcp", run, out, stage="projector")
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[0]
    code += "\nfrom safetensors.torch import save_file\nsave_file(state, 'state.safetensors')"
    subprocess.run([sys.executable, "-c", code], cwd=out, check=True)
    found, wanted = load_file(out / "state.safetensors"), load_file(run / "projector" / "weights.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_two_exports_at_once_do_not_share_a_folder(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "encoder"
    out.parent.mkdir()
    with locked(own_lock(out)), pytest.raises(ValueError, match=r"another process exports to .*encoder: wait for it"):
        export_run("encoder", run, out)
    assert export_run("encoder", run, out) == Run(run).stage("")


def test_an_encoder_that_is_still_to_be_trained_is_given_away_on_request_alone(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(run, half, ignore=shutil.ignore_patterns("joint"))
    with pytest.raises(ValueError, match=r"not finished: joint still to be trained, .* --stage NAME"):
        export_run("encoder", half, tmp_path / "encoder")
    assert export_run("encoder", half, tmp_path / "encoder", "language") == "language"


def test_verify_tells_every_damage(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "verify", run) == 0
    sound = capsys.readouterr().out.splitlines()
    # config, data and marker; initial weights; what three stages began with, checkpoint, weights, encoder; an export
    assert len(sound) == 3 + 1 + 3 * 4 + 1
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in ("projector/step_00000001/rank_00000.safetensors", "language/weights.safetensors"):
        data = bytearray((copy / path).read_bytes())
        data[-9] ^= 1
        (copy / path).write_bytes(data)
    (copy / "joint" / "encoder" / "config.json").unlink()
    assert command(monkeypatch, "verify", copy) == 1
    damaged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED")]
    reasons = ["does not match", "does not match", "does not come from", "does not come from", "config.json"]
    assert all(reason in line for reason, line in zip(reasons, damaged, strict=True))
