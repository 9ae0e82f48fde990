"""What the host does beside the kernels: masks it builds, times it waits for the device, blocks it compiles again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from test_parity import Cell, my_batches, opened
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hive_scale.batch import collate
from hive_scale.config import EngineConfig
from hive_scale.device import is_accelerator
from hive_scale.distributed import World, session
from hive_scale.engine import compilation
from hive_scale.engine.accumulation import placed
from hive_scale.engine.compilation import TOKENS, is_compiled
from hive_scale.model.build import init_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def world() -> Iterator[World]:
    with session() as world:
        yield world


class Attention(TorchFunctionMode):
    """Records (has a mask, is causal) of every call of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((given.get("attn_mask") is not None, bool(given.get("is_causal"))))
        return func(*args, **given)


@pytest.mark.parametrize("text_only", [0, 2], ids=["images", "some text alone"])
@pytest.mark.parametrize("slot", [1, 3])
@pytest.mark.parametrize(
    ("fusion", "unmasked"), [("cross_attention", (6, 4)), ("concat", (4, 4)), ("joint_attention", (2, 2))]
)
def test_attention_has_no_mask_where_causal_or_none_will_do(
    fusion: str, unmasked: tuple[int, int], slot: int, text_only: int
) -> None:
    """A mask keeps torch from its fastest kernels. Only text beside visual keys in one softmax needs one."""
    model = init_model(tiny.model_config(fusion), 0)
    samples = [replace(one, image_slot=slot) for one in tiny.samples(5, 0, text_only=text_only)]
    pixels, tokens, *rest = collate(samples, 0, tiny.IMAGE).inputs().values()
    visual = model.encode_images(pixels)
    with Attention() as mode:
        model.language_forward(visual, tokens, *rest[2:])
    without, causal = unmasked
    assert len([call for call in mode.calls if not call[0]]) == without
    assert len([call for call in mode.calls if call[1]]) == causal
    assert len(mode.calls) - without == (2 if fusion == "joint_attention" else 0)


# each of them waits, for a tensor on a GPU, until all kernels before it have run
WAITING = {
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.numpy, Tensor.cpu, Tensor.nonzero, torch.nonzero, torch.equal, torch.masked_select),
}


class Waits(TorchFunctionMode):
    """Counts reads of tensors by the host. Float64 ones were never on the device: the votes of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING and args[0].dtype != torch.float64:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(world: World, cells: list[Cell]) -> list[list[str]]:
    """The reads of one step after the first, by cell."""
    counted = []
    for cell in cells:
        engine, _ = opened(cell, world, "")
        engine.step(my_batches(cell, 0, world), 1.0)
        batches = my_batches(cell, 1, world)
        assert len(batches) > 1
        with Waits() as mode:
            engine.step(batches, 1.0)
        counted.append(mode.found)
    return counted


@pytest.mark.parametrize(
    ("engines", "size"), [(("one",), 1), (("ddp", "fsdp", "hsdp"), 2)], ids=["one process", "two ranks"]
)
def test_the_host_waits_for_the_device_once_in_a_step(engines: tuple[str, ...], size: int) -> None:
    cells = [Cell(engine, precision=precision) for engine in engines for precision in ("fp32", "bf16")]
    for cell, found in zip(cells, ranks.run(waits, size, cells)[0], strict=True):
        assert found == ["tolist"], cell


def test_micro_batches_arrive_in_order_and_unchanged(world: World) -> None:
    """Without an accelerator, this is the plain path; with one, copies run beside the kernels that read the others."""
    batches = [collate(tiny.samples(64, seed), 0, tiny.IMAGE) for seed in range(20)]
    here = [batch.pin() if is_accelerator(world.device) else batch for batch in batches]
    work = torch.rand(1000, 1000, device=world.device)
    found = []
    for batch in placed(here, world, False):
        for _ in range(3):
            work = (work @ work).clamp(-1, 1)  # the device is behind the host
        found.append([tensor * 1 for tensor in batch.tensors()])
        del batch
    for mine, original in zip(found, batches, strict=True):
        for copied, tensor in zip(mine, original.tensors(), strict=True):
            assert torch.equal(copied.cpu(), tensor * 1)
    padded = [batch.tokens.shape[1] for batch in placed(here, world, True)]
    assert padded == [batch.padded(TOKENS).tokens.shape[1] for batch in batches]


COUNTED = """
import json, sys, torch
sys.path.insert(0, "tests")
from tiny import samples
from test_parity import GLOBAL_BATCH, Cell, my_batches, opened, cut
from hive_scale.distributed import session

made = []

def counting(graph, inputs):
    made.append(None)
    return graph.forward

torch.compiler.set_default_backend(counting)
counts = []
with session() as world:
    for fusion in ("cross_attention", "joint_attention"):
        torch.compiler.reset()
        cell = Cell("one", stage=3, fusion=fusion, compile=True)
        engine, _ = opened(cell, world, "")
        for longest in (5, 40, 17, 60, 33, 70):
            before = len(made)
            whole = samples(GLOBAL_BATCH, longest, longest=longest)
            engine.step(cut(whole, 2), 1.0)
            engine.evaluate(cut(whole, 2))
            counts.append(len(made) - before)
print(json.dumps(counts))
"""


def test_ragged_captions_compile_nothing_again() -> None:
    """The first length compiles for itself and the second for any; from then on all is there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COUNTED], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    for of_fusion in (counts[:6], counts[6:]):
        assert of_fusion[0] > 0
        assert not any(of_fusion[2:]), of_fusion


def test_padding_texts_changes_no_loss() -> None:
    model, batch = init_model(tiny.model_config(), 0), collate(tiny.samples(5, 0), 0, tiny.IMAGE)
    padded = batch.padded(TOKENS)
    assert padded.tokens.shape[1] % TOKENS == 0
    assert padded.tokens.shape[1] > batch.tokens.shape[1]
    assert padded.padded(TOKENS) is padded
    torch.testing.assert_close(model(**padded.inputs()), model(**batch.inputs()))


@pytest.mark.parametrize(
    ("compile", "device", "json_file", "lacking", "expected"),
    [
        ("auto", "cuda", "", "", True),
        ("auto", "cuda", "zero2", "", True),
        ("auto", "cuda", "zero3", "", False),
        ("auto", "cuda", "", "a compiler", False),
        ("auto", "cpu", "", "", False),
        (True, "cpu", "", "", True),
        (False, "cuda", "", "", False),
    ],
)
def test_auto_compiles_where_it_pays_and_can(
    monkeypatch: pytest.MonkeyPatch, compile: Any, device: str, json_file: str, lacking: str, expected: bool
) -> None:
    monkeypatch.setattr(compilation, "_lacking", lambda _: lacking)
    path = str(ROOT / "ds_configs" / f"{json_file}.json") if json_file else ""
    assert is_compiled(EngineConfig(compile=compile, ds_config=path), device) is expected


COMPILED = """
import sys
from hive_scale import presets
from hive_scale.distributed import session
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline

words = ["engine.compile=true", "stages.projector.max_steps=2", "log.wandb=off", f"output={sys.argv[1]}"]
config = presets.load("debug", None, words)
with session() as world:
    run_pipeline(config, world, until="projector")
print([line["loss"] for line in read_metrics(config.run_dir / "projector" / "metrics.jsonl")])
"""


@pytest.mark.slow  # real compilation takes a minute
def test_a_damaged_cache_of_compiled_code_is_made_again(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    cache = tmp_path / "hive_scale" / "compiled"

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COMPILED, str(tmp_path / name)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    first = run("first")
    assert first.returncode == 0, first.stderr
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"damaged")
    failed = run("second")
    assert "TryAgain: compiled blocks failed" in failed.stderr
    assert not cache.exists()
    again = run("second")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
