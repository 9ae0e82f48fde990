"""lmms-eval itself, in an environment of its own, asks an exported model and gets the answers of the run.

Why: others compare by its numbers. Its environment shares this one's packages and adds its own: two minutes and a
gigabyte, so these tests are marked slow: `pytest -m slow tests/test_lmms_eval.py`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_asked import FAMILIES, image

from hive_scale.config import DataConfig, ModelConfig, PartConfig
from hive_scale.data.tokenizer import Tokenizer
from hive_scale.evaluate.vqa_runner import HiveAnswerer
from hive_scale.evaluate.vqa_types import ImageFile, Question
from hive_scale.export.huggingface import export_llava
from hive_scale.model.build import init_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
LMMS = ("lmms-eval==0.7.3", "decord", "filelock<3.24")  # it reaches into a module that later ones have not
QUESTIONS = ["what is in the image ?", "is it red ?", "who is the user ?"]
TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, do_sample: false, temperature: 0, num_beams: 1, until: ["@@@"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
import base64, io
from PIL import Image
def visual(doc):
    return [Image.open(io.BytesIO(base64.b64decode(doc["image"]))).convert("RGB")]
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    if given := os.environ.get("LMMS_PYTHON"):
        return Path(given)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    ours = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text("\n".join([*site.getsitepackages(), str(ROOT)]))
    subprocess.run([str(ours), "-m", "pip", "install", "-q", *LMMS], check=True)
    return ours


def png(seed: int) -> bytes:
    data = io.BytesIO()
    image(seed).save(data, "PNG")
    return data.getvalue()


def evaluate(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "hive_scale", "evaluate", *words, "--backend", "lmms_eval"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)


@pytest.mark.parametrize("family", ["Llama 3.2", "SmolLM2", "Qwen2 base"])
def test_a_real_task_end_to_end(python: Path, family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]
    language = tiny.language("llama", vocab_size=330, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
    config = ModelConfig(
        PartConfig(config=tiny.SIGLIP), PartConfig(config=language), fusion="concat", encoder_layer_ratio=0.5
    )
    questions = [Question(str(i), text, ImageFile(str(i), lambda i=i: png(i)), {}) for i, text in enumerate(QUESTIONS)]
    for seed in range(20):  # some of these small models say the same to everything
        model = tiny.sighted(init_model(config, seed).eval(), 3)
        asker = HiveAnswerer(model, DataConfig(image_transform="resize"), torch.device("cpu"))
        asker.tokenizer = Tokenizer(tokenizer)
        expected = [answer.text for answer in asker.answer(questions, 6)]
        if len(set(expected)) > 1:
            break
    assert len(set(expected)) > 1
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    export_llava(config, weights, tmp_path / "llava", tokenizer, "resize")
    task = tmp_path / "task"
    task.mkdir()
    rows = [
        {"question": text, "answer": answer, "image": base64.b64encode(png(i)).decode()}
        for i, (text, answer) in enumerate(zip(QUESTIONS, expected, strict=True))
    ]
    (task / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "local_questions.yaml").write_text(TASK.replace("FILE", str(task / "rows.jsonl")))
    (task / "utils.py").write_text(UTILS)
    words = [str(tmp_path / "llava"), "--tasks", "local_questions", "--lmms_args", f"--include_path {task}"]
    done = evaluate(python, *words, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("*samples_local_questions.jsonl")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    answers = [line["filtered_resps"] for line in lines]
    assert [(one if isinstance(one, str) else one[0]).strip() for one in answers] == expected


def test_what_fails_there_fails_here(python: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = evaluate(python, str(tmp_path), "--tasks", "gqa")
    assert done.returncode != 0
