"""The project's requirements on its dependencies, tested in a minute with the newest and the oldest versions allowed.

Why: a minor release of one of them has broken both commands of the README before. `make test-newest` and `make
test-oldest` run every test marked `contract` in environments of their own.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_parity import CLIP, DS_CONFIGS, cut, data_of, model_of, stage_of, weights_of
from torch import Tensor

from hive_scale import requirements
from hive_scale.config import CheckpointingConfig, EngineConfig
from hive_scale.distributed import World
from hive_scale.engine import open_engine
from hive_scale.model.build import init_model, meta_model
from hive_scale.model.generate import generate
from hive_scale.param_groups import apply_trainable_groups
from hive_scale.registry import FUSION_NAMES

pytestmark = pytest.mark.contract
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("fusion", FUSION_NAMES)
@pytest.mark.parametrize("llm", ["llama", "qwen2", "qwen3"])
def test_forward_backward_and_decoding_with_a_cache(fusion: str, llm: str) -> None:
    model = tiny.sighted(init_model(tiny.model_config(fusion, llm), 0), 2.0)
    batch = tiny.batch(4, text_only=1)
    loss = model(**batch.inputs())
    loss.backward()
    assert torch.isfinite(loss)
    unused = model.unused_parameters()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.isfinite().all())) or name in unused, name
    model.eval()
    prompts = [[1, 5, 9], [1, 7], [1, 8, 3, 4]]
    images, about = batch.pixels[1:3], [0, None, 1]
    cached = generate(model, images, about, prompts, end_ids=2, max_tokens=6)
    for prompt, image, answer in zip(prompts, about, cached, strict=True):
        written = list(prompt)
        for token in answer:
            written.append(following(model, images[image or 0][None], image is not None, written))
            assert written[-1] == token


@torch.no_grad()
def following(model: Any, pixels: Tensor, has_image: bool, tokens: list[int]) -> int:
    """The likeliest next token, from the whole text anew."""
    hidden = model.language_forward(model.encode_images(pixels), torch.tensor([tokens]), torch.tensor([has_image]))
    return int(model.logits(hidden[:, -1]).argmax())


def one_step(world: World, settings: EngineConfig) -> tuple[float, float, float]:
    """Of a step of stage two: loss, gradient norm, and the loss of the same samples after it."""
    stage = stage_of(2, "cross_attention", world.size)
    model, weights = meta_model(model_of("cross_attention")), weights_of("cross_attention")
    engine = open_engine(
        model, apply_trainable_groups(model, stage, model.unused_parameters()), stage, settings, world, weights
    )
    mine = cut(data_of("ragged", 0), world.size * 2)[world.rank :: world.size]
    output = engine.step(mine, 1.0)
    assert output.grad_norm > CLIP
    total, count = engine.evaluate(mine)
    return output.loss, output.grad_norm, total / count


def test_a_step_is_the_same_under_every_engine() -> None:
    recomputed = CheckpointingConfig(vision="full", language="selective", fusion="full")
    zero2 = str(DS_CONFIGS / "zero2.json")
    engines = {
        "fsdp": EngineConfig(),
        "ddp": EngineConfig(shard_size=1),
        "fsdp, recomputed": EngineConfig(checkpointing=recomputed),
        "zero2": EngineConfig(ds_config=zero2),
        "zero3": EngineConfig(ds_config=str(DS_CONFIGS / "zero3.json"), checkpointing=recomputed),
    }
    [alone] = ranks.run(one_step, 1, EngineConfig())
    for name, settings in engines.items():
        assert ranks.run(one_step, 2, settings)[0] == pytest.approx(alone, rel=2e-6), name
    half = ranks.run(one_step, 2, EngineConfig(ds_config=zero2, precision="bf16"))[0]
    assert half[0] == pytest.approx(alone[0], rel=2e-2)


def test_this_environment_is_within_the_ranges() -> None:
    assert requirements.problem() is None


def test_the_lock_satisfies_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    locked: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            one = Requirement(line)
            locked.setdefault(canonicalize_name(one.name), []).append(one)
    for requirement in asked:
        pins = locked.get(canonicalize_name(requirement.name))
        assert pins, f"{requirement.name} is not in requirements.lock: make lock"
        for pin in pins:
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert requirement.specifier.contains(exact.version, prereleases=True), (
                f"{pin} in requirements.lock: make lock"
            )


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_pins_each_package_once_for_each_python(python: str) -> None:
    names = []
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            assert "://" not in line
            one = Requirement(line)
            where = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
                     "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix",
                     "implementation_name": "cpython", "platform_python_implementation": "CPython"}  # fmt: skip
            if one.marker is None or one.marker.evaluate(where):
                names.append(canonicalize_name(one.name))
    assert len(names) == len(set(names))
    assert {"torch", "transformers", "deepspeed"} <= set(names)


def test_the_versions_are_told() -> None:
    """For the log of `make test-newest`: which versions these results are of."""
    print({one.name: version(one.name) for one in requirements.requirements()})
