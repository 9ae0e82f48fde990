"""Classes that a user registers from outside the package train, resume, plan, verify and export like our own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hive_scale import presets, registry
from hive_scale.checkpoint.format import StepCheckpoint, steps_in
from hive_scale.config import Config, EngineConfig, GroupConfig, ModelConfig, PartConfig, StageConfig
from hive_scale.model import build
from hive_scale.model.encoders import EncoderFamily
from hive_scale.model.fusion import Fusion
from hive_scale.observability.metrics import read_metrics
from hive_scale.plan.flops import count
from hive_scale.registry import ADAPTERS, EXTENSIONS, FUSIONS, OPTIMIZERS, Registry

ROOT = Path(__file__).resolve().parents[1]
VIT = {name: value for name, value in tiny.SIGLIP.items() if name != "model_type"} | {"model_type": "vit_msn"}
STAGES = ("projector", "language", "joint")
WORDS = [
    *("extensions=[toy_extension]", "fusion=toy_mean", f"model.vision.config={json.dumps(VIT)}"),
    *(f"stages.{stage}.{word}" for stage in STAGES for word in ("max_steps=3", "global_batch=8", "optimizer=toy_sgd")),
    *(
        "stages.language.adapter.kind=toy_scale",
        "blank_image_control=false",
        "save_interval=2",
        "model.encoder_layer_ratio=0.5",
    ),
]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    paths["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {name: value for name, value in os.environ.items() if name != EXTENSIONS}
    return subprocess.run(
        command, cwd=ROOT, env=own | paths | environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("toy") / "run"
    done = run(sys.executable, "launchers/pretrain.py", *WORDS, f"output={output}")
    assert done.returncode == 0, done.stderr
    return output


def newest_masters(stage: Path) -> list[str]:
    return list(StepCheckpoint(steps_in(stage)[-1]).masters())


def test_a_fusion_an_encoder_an_optimizer_and_an_adapter_from_outside_train(trained: Path) -> None:
    for stage in STAGES:
        lines = read_metrics(trained / stage / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert lines[0]["tflops_per_device"] > 0
        assert "grad_rms" not in lines[-1], "an optimizer without mean squares says nothing of layers' gradients"
        newest = StepCheckpoint(steps_in(trained / stage)[-1])
        assert {key.split("/")[0] for key in newest.shapes} == {"master", "momentum_buffer"}
    of_llm = [name for name in newest_masters(trained / "language") if name.startswith("language.")]
    assert of_llm
    assert all(name.endswith("_proj.scale") for name in of_llm), "the adapter stands for the LLM's own weights"
    first, last = (load_file(trained / name / "weights.safetensors") for name in ("initial", "joint"))
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert moved == {"projector", "fusion", "language", "vision"}


@pytest.mark.parametrize("zero", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))])
def test_they_train_alike_on_two_ranks(zero: str, trained: Path, tmp_path: Path) -> None:
    json_file = [f"--ds_config=ds_configs/{zero}.json"] if zero else []
    output = tmp_path / "run"
    done = run("torchrun", "--nproc_per_node=2", "launchers/pretrain.py", *json_file, *WORDS, f"output={output}")
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(path / "joint" / "weights.safetensors") for path in (output, trained))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow  # three jobs
def test_jobs_of_a_chain_have_them(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run(sys.executable, "slurm/submit_pipeline.py", "--cluster", "local", *WORDS, f"output={output}")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(output / "joint" / "metrics.jsonl")] == [1, 2, 3]


def test_the_encoder_is_exported_in_its_own_class(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    done = run(
        *(sys.executable, "launchers/export.py", "encoder", str(trained), "--output", str(out)),
        **{EXTENSIONS: "toy_extension"},
    )
    assert done.returncode == 0, done.stderr
    tower = AutoModel.from_pretrained(out)
    assert type(tower).__name__ == "ViTMSNModel"
    weights = load_file(trained / "joint" / "weights.safetensors")
    assert torch.equal(tower.embeddings.cls_token, weights["vision.embeddings.cls_token"])


def test_without_its_module_a_run_is_refused_with_the_remedy(trained: Path, tmp_path: Path) -> None:
    done = run(sys.executable, "launchers/export.py", "encoder", str(trained), "--output", str(tmp_path / "encoder"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{EXTENSIONS}=toy_extension in the environment" in done.stderr


def test_what_it_is_not_is_not_exported(trained: Path, tmp_path: Path) -> None:
    done = run(
        *(sys.executable, "launchers/export.py", "llava", str(trained), "--output", str(tmp_path / "llava")),
        **{EXTENSIONS: "toy_extension"},
    )
    assert done.returncode == 2
    assert "a toy_mean model is not a LLaVA" in done.stderr


def test_its_report_has_no_attention_maps_and_says_so(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    command = [sys.executable, "launchers/visualize.py", "report", str(trained), "--output", str(page)]
    done = run(*command, **{EXTENSIONS: "toy_extension"})
    assert done.returncode == 0, done.stderr
    assert "ToyMean has no attention over patches that could be drawn" in page.read_text()
    assert "Gradient of the loss at each encoder layer" in page.read_text()


def test_the_planner_knows_them(tmp_path: Path) -> None:
    done = run(sys.executable, "launchers/plan.py", *WORDS, "--gpu", "rtx3090", "--json", f"output={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    plans = {plan["stage"]: plan for plan in json.loads(done.stdout)["stages"]}
    memory = plans["joint"]["memory"]
    assert memory["moments"] == pytest.approx(memory["parameters"], rel=0.05), "one state of a number, not two"


def test_a_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(sys.executable, "launchers/pretrain.py", "extensions=[no_such]", f"output={tmp_path}/run")
    assert done.returncode == 2
    assert "extensions: no_such cannot be imported" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_entry_that_lacks_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="Nothing does not say attention_layers, before_layer, new_parameters"):

        @FUSIONS.register("nothing")
        class Nothing(Fusion):
            pass

    with pytest.raises(ValueError, match="Half does not say model, processor"):

        @registry.ENCODERS.register("half")
        class Half(EncoderFamily):
            num_leading = 1

    assert "nothing" not in FUSIONS.names()


def test_a_taken_name_is_refused() -> None:
    other = type("Other", (FUSIONS["concat"],), {})
    with pytest.raises(ValueError, match="fusion concat is there already"):
        FUSIONS.register("concat")(other)


def test_a_typo_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean concat"):
        Config(model=ModelConfig(fusion="concatt"))
    stage = StageConfig({"all": GroupConfig(["projector.*"], 1e-3)}, optimizer="adam")
    with pytest.raises(ValueError, match=r"stages.one.optimizer=adam: .*: did you mean adamw"):
        Config(stages={"one": stage})
    with pytest.raises(ValueError, match="there are a, b"):
        Registry("thing", {"a": "x", "b": "y"}).check("zzz")


def test_every_entry_of_ours_is_complete() -> None:
    for one in (FUSIONS, registry.ENCODERS, registry.HOSTS, OPTIMIZERS, ADAPTERS):
        for name in one.names():
            assert isinstance(one[name], type)


def test_a_model_that_cannot_be_traced_trains_without_mfu(monkeypatch: Any, caplog: Any) -> None:
    from hive_scale.plan import flops

    def fail(*_: Any) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(flops, "count", fail)
    stage = StageConfig({"all": GroupConfig(["projector.*"], 1e-3)})
    assert flops.estimate(tiny.model_config(), stage, EngineConfig().checkpointing) is None
    assert "MFU is not shown: NotImplementedError: no such operator" in caplog.text


def test_flops_of_a_fusion_from_outside_are_counted(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    registry.load_extensions(["toy_extension"])
    model = ModelConfig(PartConfig(config=VIT), PartConfig(config=tiny.language()), fusion="toy_mean")
    stage = StageConfig({"all": GroupConfig(["projector.*", "fusion.*"], 1e-3)})
    built, _ = build.for_stage(model, stage)
    (depth,) = built.fusion.depths
    found = count(built).components(3, 10, 9)["fusion"]
    assert depth == 3
    assert found.forward == 3 * 2 * 48 * 48  # one product of a row for each sample
    assert found.backward == 2 * found.forward  # its weight's and, since the projector trains, its input's


def test_every_preset_takes_a_fusion_from_outside(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    registry.load_extensions(["toy_extension"])
    for name in presets.PRESETS:
        if "fusion" in signature(presets.PRESETS[name]).parameters:
            assert presets.load(name, None, ["fusion=toy_mean", "output=run"]).model.fusion == "toy_mean"


def test_the_examples_of_the_docs_are_entries() -> None:
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL))
    code += f"""
import tiny
from hive_scale.config import ModelConfig, PartConfig, StageConfig, GroupConfig
from hive_scale.engine.optimizer import make_optimizer
from hive_scale.model.build import init_model

parts = PartConfig(config={VIT!r}), PartConfig(config=tiny.language())
model = init_model(ModelConfig(*parts, fusion="my_fusion"), seed=0)
loss = model(**tiny.batch().inputs())
loss.backward()
assert model.fusion.layers[0].proj.weight.grad.any()
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
