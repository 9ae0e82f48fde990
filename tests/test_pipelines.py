"""What `export.py` writes opens in transformers' pipelines, and writes what our captioner writes.

Why: a directory that needs a page of code to be tried is not tried. The card's own lines are executed, and its metadata
read by the library of the hub.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_conversation import fast
from test_train import small, some_pairs  # noqa: F401  (the fixture is one of this module, too)
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hive_scale import HiveForConditionalGeneration
from hive_scale.captioner import Captioner
from hive_scale.checkpoint.io import CorruptFile
from hive_scale.checkpoint.run_reader import Run
from hive_scale.checkpoint.weights import read_weights, write_weights
from hive_scale.config import Config, DataConfig, ModelConfig, PartConfig, TokenizerConfig
from hive_scale.distributed import session
from hive_scale.export import export_run, from_pretrained, save_pretrained
from hive_scale.export.model_card import card
from hive_scale.model.build import init_model
from hive_scale.pipeline import run_pipeline

pytestmark = pytest.mark.contract
FUSIONS = ["cross_attention", "joint_attention", "concat"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = torch.randint(0, 256, (70, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def exported(folder: Path, fusion: str, llm: str = "llama", template: str | None = None, **data: Any) -> Path:
    """An untrained model that looks at its image, as `export.py hive` writes it."""
    tokenizer = fast(template)
    tokenizer.stock.save_pretrained(folder / "tokenizer")
    settings = DataConfig(tokenizer=TokenizerConfig(str(folder / "tokenizer")), **data)
    language = tiny.language(llm, vocab_size=tokenizer.vocab_size, bos_token_id=None, eos_token_id=None)
    parts = PartConfig(config=tiny.SIGLIP), PartConfig(config=language)
    model = ModelConfig(*parts, fusion=fusion, encoder_layer_ratio=0.5)  # type: ignore[arg-type]
    made = tiny.sighted(init_model(model, seed=5), 4)
    write_weights(folder / "w.safetensors", dict(made.named_parameters()))
    save_pretrained(Config(model=model, data=settings), read_weights(folder / "w.safetensors"), folder / "hive")
    return folder / "hive"


CASES: list[tuple[str, str, Any]] = [(fusion, llm, "resize") for fusion in FUSIONS for llm in ("llama", "qwen2")]
CASES += [("cross_attention", "llama", transform) for transform in ("crop", "pad")]


@pytest.mark.parametrize(("fusion", "llm", "transform"), CASES)
def test_a_pipeline_continues_captions_as_the_captioner(
    fusion: str, llm: str, transform: Any, image: Path, tmp_path: Path
) -> None:
    path = exported(tmp_path, fusion, llm, image_transform=transform)
    captioner = Captioner.open(path, CPU)
    (expected,) = captioner.write([captioner.read(image)], "a horse", max_tokens=8)
    write: Any = pipeline("image-text-to-text", model=str(path))
    settings = {"max_new_tokens": 8, "generate_kwargs": {"do_sample": False}}
    (made,) = write(images=str(image), text="a horse", **settings)
    assert made["generated_text"].strip() == expected.text
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "a horse"}]
    (chat,) = write(text=[{"role": "user", "content": content}], return_full_text=False, **settings)
    assert "a horse" + chat["generated_text"].rstrip() == expected.text
    (beams,) = write(images=str(image), text="a horse", max_new_tokens=8, generate_kwargs={"num_beams": 2})
    assert beams["generated_text"].startswith("a horse")


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("position", ["user", "start"])
def test_a_pipeline_answers_questions_as_the_captioner(fusion: str, position: Any, image: Path, tmp_path: Path) -> None:
    path = exported(tmp_path, fusion, format="conversation", image_position=position)
    captioner = Captioner.open(path, CPU)
    (expected,) = captioner.write([captioner.read(image)], "what is it ?", max_tokens=8)
    ask: Any = pipeline("image-text-to-text", model=str(path))
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "what is it ?"}]
    asked = [{"role": "user", "content": content}]
    (made,) = ask(text=asked, max_new_tokens=8, return_full_text=False, generate_kwargs={"do_sample": False})
    assert made["generated_text"].strip() == expected.text
    model, processor = ask.model, AutoProcessor.from_pretrained(path)
    assert type(model) is HiveForConditionalGeneration
    pixels = Image.open(image)
    inputs = processor(images=pixels, text=["what is it ?", "is it a horse ?"])  # two questions about one image
    rows = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert processor.decode(rows[0], skip_special_tokens=True).strip() == expected.text


def test_an_older_export_is_still_read(image: Path, tmp_path: Path) -> None:
    """One without what transformers needs: config.json of four keys, the tokenizer as it was in training."""
    path = exported(tmp_path, "cross_attention")
    captioner = Captioner.open(path, CPU)
    (expected,) = captioner.write([captioner.read(image)], "a horse", max_tokens=8)
    for name in ("processor_config.json", "generation_config.json", "chat_template.jinja"):
        (path / name).unlink()
    fast(None).stock.save_pretrained(path)
    content = json.loads((path / "config.json").read_text())
    kept = {name: content[name] for name in ("model_type", "code", "model", "data")}
    (path / "config.json").write_text(json.dumps(kept))
    captioner = Captioner.open(path, CPU)
    (found,) = captioner.write([captioner.read(image)], "a horse", max_tokens=8)
    assert found == expected
    model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    model.config.image_token_id = processor.image_token_id
    inputs = processor(images=Image.open(image), text="a horse")
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=captioner.tokenizer.eos_id)
    assert processor.decode(made[0], skip_special_tokens=True).strip() == expected.text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, some_pairs: None) -> Path:  # noqa: F811
    config = small(tmp_path_factory.mktemp("run") / "run", steps=1)
    with session() as world:
        run_pipeline(config, world)
    return config.run_dir


def test_the_lines_of_a_card_work_and_the_hub_reads_its_head(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, name in {"hive": "caption", "llm": "llm", "encoder": "features"}.items():
        export_run(kind, run, tmp_path / kind)
        found = ModelCard.load(tmp_path / kind / "README.md")
        data: Any = found.data
        assert (data.license, data.license_name) == ("other", "as-of-its-parts")
        assert PIPELINE_REGISTRY.check_task(data.pipeline_tag)[0] == data.pipeline_tag
        assert data.tags == ["hive", "vision"]
        if kind == "hive":
            (result,) = data.eval_results
            loss = re.findall(r"\| joint \|.* (\d+\.\d+) \|$", found.text, re.MULTILINE)
            assert [float(one) for one in loss] == [result.metric_value]
            assert data.metrics == ["loss"]
        else:
            assert data.metrics is None, "the loss is the whole model's"
        (code,) = re.findall(r"```python\n(.*?)```", found.text, re.DOTALL)
        names: dict[str, Any] = {"image": Image.open(image)}
        monkeypatch.chdir(tmp_path / kind)
        exec(code, names)
        assert name in names
    features: Any = pipeline("image-feature-extraction", model=str(tmp_path / "encoder"))(str(image))
    assert len(features[0]) == (tiny.IMAGE // tiny.SIGLIP["patch_size"]) ** 2
    assert len(features[0][0]) == tiny.SIGLIP["hidden_size"]
    batch = tiny.batch()
    theirs: Any = AutoModel.from_pretrained(tmp_path / "hive")
    assert torch.equal(theirs.model(**batch.inputs()), from_pretrained(tmp_path / "hive")(**batch.inputs()))


def test_damaged_files_are_refused_and_saving_anew_mends(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "hive"
    export_run("hive", run, path)
    model = HiveForConditionalGeneration.from_pretrained(path)
    for name, auto in (("model.safetensors", AutoModel), ("processor_config.json", AutoProcessor)):
        data = (path / name).read_bytes()
        place = data.rindex(b'"caption"') + 2 if b'"caption"' in data else len(data) - 2
        (path / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        opened: Any = auto
        with pytest.raises(CorruptFile, match=name):
            opened.from_pretrained(path)
        (path / name).write_bytes(data)
    model.save_pretrained(path)
    assert type(AutoModel.from_pretrained(path)) is HiveForConditionalGeneration


def test_a_card_names_what_the_hub_has(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Run(run)
    url = "https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/main/cc3m-train-{0000..0575}.tar"
    parts = {"vision": PartConfig("google/siglip-base-patch16-224"), "language": PartConfig("./here")}
    config = replace(
        read.config,
        model=replace(read.config.model, **parts),
        data=replace(read.config.data, train=[url, "sample:train"]),
    )
    monkeypatch.setattr(read, "config", config)
    data: Any = ModelCard(card("hive", read, "joint", "0", "fp32")).data
    assert data.base_model == ["google/siglip-base-patch16-224"]
    assert data.datasets == ["pixparse/cc3m-wds"]
    averaged: Any = ModelCard(card("hive", read, "joint", "0", "fp32", ema=True)).data
    assert averaged.metrics is None, "nothing has measured averaged weights"
    assert ModelCard(card("llm", read, "joint", "0", "fp32")).data.base_model is None  # type: ignore[attr-defined]
