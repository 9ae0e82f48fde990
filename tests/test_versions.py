"""Exports mean the same to transformers 4, on which many tools are built, as to the version that wrote them.

Why: version 4 only warns about names it does not know, and continues with random weights, another rotary base or no
tokenizer. Its last release is installed beside this environment's packages, without its dependencies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_conversation import TEMPLATES, fast
from test_encoders import TOWERS as FAMILIES
from torch import Tensor

from hive_scale.config import DataConfig, ModelConfig, PartConfig
from hive_scale.evaluate.vqa_runner import HiveAnswerer
from hive_scale.evaluate.vqa_types import ImageFile, Question
from hive_scale.export import huggingface
from hive_scale.model.build import init_model
from hive_scale.model.hive import Hive

pytestmark = pytest.mark.contract
OLD = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 6, "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}  # fmt: skip
TEXT = "what is in the image ?"
READER = """
import json, sys, torch, transformers
from PIL import Image
from safetensors.torch import save_file
assert transformers.__version__.startswith("4."), transformers.__version__

def opened(auto, folder):
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(report.values()), (folder, report)
    return model.eval()

def encoder(folder, image, text):
    pixels = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)(images=image, return_tensors="pt")
    return {"states": opened(transformers.AutoModel, folder)(**pixels, output_hidden_states=True).hidden_states[-2]}

def llm(folder, image, text):
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    return {"tokens": tokens, "logits": opened(transformers.AutoModelForCausalLM, folder)(tokens).logits}

def llava(folder, image, text):
    processor = transformers.AutoProcessor.from_pretrained(folder, use_fast=False)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(said, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    model = opened(transformers.AutoModelForImageTextToText, folder)
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return {"written": written[:, inputs.input_ids.shape[1]:]}

image = Image.open(sys.argv[1])
with torch.no_grad():
    for kind, folder, text in json.load(sys.stdin):
        made = {"encoder": encoder, "llm": llm, "llava": llava}[kind](folder, image, text)
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, folder + ".safetensors")
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *OLD]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{OLD[0]} cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def png() -> bytes:
    pixels = torch.randint(0, 256, (tiny.IMAGE, tiny.IMAGE, 3), generator=torch.Generator().manual_seed(4)).byte()
    data = BytesIO()
    Image.fromarray(pixels.numpy()).save(data, "PNG")
    return data.getvalue()


def weights_of(model: Hive) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    path.write_bytes(png())
    return path


TOKENIZER = fast(TEMPLATES["no system role"])


def model_config(tower: Any, llm: str, **changes: Any) -> ModelConfig:
    language = tiny.language(
        llm, **{"vocab_size": TOKENIZER.vocab_size, "bos_token_id": 1, "eos_token_id": 2, **changes}
    )
    return ModelConfig(PartConfig(config=tower), PartConfig(config=language), fusion="concat", encoder_layer_ratio=0.5)


TOWERS: dict[str, tuple[dict[str, Any], Any]] = {
    "siglip": (tiny.SIGLIP, "resize"),
    "clip": (tiny.CLIP, "crop"),
    "dinov2": ({"model_type": "dinov2"} | FAMILIES["dinov2"], "crop"),
}
# the rest but for vit, whose class makes a pooler that no file of ours has
ENCODERS: dict[str, tuple[dict[str, Any], Any]] = TOWERS | {
    name: ({"model_type": name} | FAMILIES[name], "resize")
    for name in ("dinov2_with_registers", "dinov3_vit", "aimv2_vision_model", "ijepa")
}
LLMS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("llama", {"rope_theta": 500000.0, "tie_word_embeddings": False}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "longrope": ("qwen3", {"rope_parameters": LONGROPE}),
    "qwen2": ("qwen2", {"rope_theta": 1000000.0}),
    "qwen3": ("qwen3", {"rope_theta": 1000000.0}),
}
LLMS |= {name: made for name, made in tiny.LLMS.items() if made[0] not in ("llama", "qwen2", "qwen3")}
LLMS["olmo2"] = ("olmo2", {})  # version 4 has no yarn for it, and says so
LONG = " ".join([TEXT] * 8)


@cache
def of_llava(tower: str) -> Hive:
    """The first that says something; which random weights do differs between releases."""
    config = model_config(TOWERS[tower][0], "llama", rope_theta=500000.0)
    made = (tiny.sighted(init_model(config, seed).eval(), 3) for seed in range(3, 30))
    return next(model for model in made if all(answer(model, tower, position) for position in ("user", "start")))


def answer(model: Hive, tower: str, position: Any) -> str:
    asker = HiveAnswerer(
        model, DataConfig(image_transform=TOWERS[tower][1], image_position=position), torch.device("cpu")
    )
    asker.tokenizer = TOKENIZER
    return asker.answer([Question("q", TEXT, ImageFile("p", png), {})], 6)[0].text


@pytest.fixture(scope="module")
def found(old: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What version 4 computes with each exported directory, by its name; one process reads them all."""
    folder, jobs = tmp_path_factory.mktemp("exports"), []
    for tower, (config, mode) in ENCODERS.items():
        weights = dict(init_model(model_config(config, "llama"), 1).named_parameters())
        huggingface.export_encoder(model_config(config, "llama"), weights, folder / tower, mode)
        jobs.append(("encoder", str(folder / tower), ""))
    for tower, (config, mode) in TOWERS.items():
        for position in ("user", "start"):
            path = folder / f"llava-{tower}-{position}"
            of_model = model_config(config, "llama", rope_theta=500000.0)
            huggingface.export_llava(
                of_model, weights_of(of_llava(tower)), path, TOKENIZER.stock, mode, position=position
            )
            jobs.append(("llava", str(path), TEXT))
    for name, (llm, changes) in LLMS.items():
        weights = dict(init_model(model_config(tiny.SIGLIP, llm, **changes), 1).named_parameters())
        huggingface.export_llm(model_config(tiny.SIGLIP, llm, **changes), weights, folder / name, TOKENIZER.stock)
        jobs.append(("llm", str(folder / name), LONG))
    environment = os.environ | {"PYTHONPATH": str(old), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READER, str(image)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("tower", ENCODERS)
@torch.no_grad()
def test_an_encoder(found: dict[str, dict[str, Tensor]], image: Path, tower: str) -> None:
    config = ENCODERS[tower][0]
    model = init_model(model_config(config, "llama"), 1).eval()
    pixels = torch.frombuffer(bytearray(Image.open(image).tobytes()), dtype=torch.uint8)
    states = model.encode(pixels.view(1, tiny.IMAGE, tiny.IMAGE, 3).permute(0, 3, 1, 2))
    expected = states[config["num_hidden_layers"] - 1]
    torch.testing.assert_close(found[tower]["states"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LLMS)
@torch.no_grad()
def test_an_llm(found: dict[str, dict[str, Tensor]], name: str) -> None:
    llm, changes = LLMS[name]
    model = init_model(model_config(tiny.SIGLIP, llm, **changes), 1).eval()
    tokens = found[name]["tokens"]
    assert tokens.tolist() == [TOKENIZER.stock.encode(LONG)]
    torch.testing.assert_close(found[name]["logits"], model.language(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["user", "start"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_llava(found: dict[str, dict[str, Tensor]], tower: str, position: Any) -> None:
    said = answer(of_llava(tower), tower, position)
    assert TOKENIZER.decode(found[f"llava-{tower}-{position}"]["written"][0].tolist()).strip() == said
    assert said
