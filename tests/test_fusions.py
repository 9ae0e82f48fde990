"""Fusions of other models beside HIVE's: each computes what its model computes, in the model's own library where it is.

Their losses and gradients are compared with a plain rewrite in test_references.py, and with a bare loop under every
engine in test_parity.py.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from test_hosts import close, config_of, random_model, untouched
from test_parity import STEPS, Cell, factor, model_of, my_batches, opened, small_jsons, stage_of
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Qwen3VLTextConfig, Qwen3VLTextModel

from hive_scale.checkpoint.checkpointer import Checkpointer
from hive_scale.config import AdapterConfig, PartConfig
from hive_scale.distributed import World, session
from hive_scale.engine import Engine
from hive_scale.export.huggingface import export_llava
from hive_scale.model.build import for_stage, init_model, meta_model
from hive_scale.observability.layer_stats import layer_grad_rms
from hive_scale.registry import FUSIONS
from hive_scale.report.attention_maps import attention_maps

pytestmark = pytest.mark.contract
ROOT = Path(__file__).resolve().parents[1]
NEW = ("deepstack", "gated_cross_attention", "q_former")
NUM_PATCHES = 16


# -- other libraries' own models ---------------------------------------------------------------------------------


@torch.no_grad()
def test_deepstack_is_the_text_model_of_qwen3_vl() -> None:
    model = random_model(replace(config_of("qwen3", "deepstack"), encoder_layer_ratio=0.75), 0.0)
    assert (model.encoder_depths, model.fusion.depths) == ((1, 2, 3), (1, 2))
    fields = tiny.language("qwen3") | {"model_type": "qwen3_vl_text"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    theirs = Qwen3VLTextModel(Qwen3VLTextConfig(**fields, rope_parameters=rope)).eval()
    theirs.load_state_dict(model.language.model.state_dict())
    batch = tiny.batch(3)
    shallow, deeper, deepest = model.encode_images(batch.pixels)
    text = model.language.model.embed_tokens(batch.tokens)
    sequence = torch.cat([text[:, :1], deepest, text[:, 1:]], dim=1)
    is_visual = torch.zeros(sequence.shape[:2], dtype=torch.bool)
    is_visual[:, 1 : 1 + NUM_PATCHES] = True
    added = [one.flatten(0, 1) for one in (shallow, deeper)]
    expected = theirs(inputs_embeds=sequence, visual_pos_masks=is_visual, deepstack_visual_embeds=added)
    ours = model.language.model.norm(model.language_forward([shallow, deeper, deepest], batch.tokens))
    close(ours, expected.last_hidden_state[:, NUM_PATCHES:])
    without = theirs(inputs_embeds=sequence).last_hidden_state[:, NUM_PATCHES:]
    assert (ours - without).abs().max() > 1e-2


@torch.no_grad()
def test_the_q_former_is_that_of_blip_2() -> None:
    config = replace(tiny.model_config("q_former"), num_query_tokens=5, num_query_layers=3)
    ours: Any = random_model(config, 0.0).projector[0]
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=32, encoder_hidden_size=32, num_attention_heads=2, intermediate_size=128, num_hidden_layers=3,
            cross_attention_frequency=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5,
        )
    ).eval()  # fmt: skip
    weights = {f"layernorm.{one}": getattr(ours.query_norm, one) for one in ("weight", "bias")}
    for number, layer in enumerate(ours.layers):
        at = f"encoder.layer.{number}"
        for attention, name in ((layer.self_attn, "attention"), (layer.multihead_attn, "crossattention")):
            for one in ("weight", "bias"):
                parts = getattr(attention, f"in_proj_{one}").chunk(3)
                for part, its in zip(parts, ("query", "key", "value"), strict=True):
                    weights[f"{at}.{name}.attention.{its}.{one}"] = part
        places: dict[str, Any] = {
            "attention.output.dense": layer.self_attn.out_proj,
            "attention.output.LayerNorm": layer.norm1,
            "crossattention.output.dense": layer.multihead_attn.out_proj,
            "crossattention.output.LayerNorm": layer.norm2,
            "intermediate_query.dense": layer.linear1,
            "output_query.dense": layer.linear2,
            "output_query.LayerNorm": layer.norm3,
        }
        for name, module in places.items():
            weights |= {f"{at}.{name}.{one}": getattr(module, one) for one in ("weight", "bias")}
    theirs.load_state_dict(weights)
    features = torch.randn(3, NUM_PATCHES, 32, generator=torch.Generator().manual_seed(0))
    queries = ours.queries.expand(3, -1, -1)
    made = theirs(query_embeds=queries, encoder_hidden_states=ours.norm(features)).last_hidden_state
    close(ours(features), ours.out(made))
    assert ours(features).shape == (3, 5, 48)


@torch.no_grad()
def test_both_gates_of_flamingos_layer_must_open() -> None:
    model = random_model(tiny.model_config("gated_cross_attention"), 0.0)
    batch = tiny.batch(3)
    plain = untouched(model)(batch.tokens).logits
    visual = model.encode_images(batch.pixels)
    gates = {name: one for name, one in model.named_parameters() if name.endswith(".gate")}
    assert len(gates) == 2 * len(model.fusion.depths)

    def logits(has_image: torch.Tensor | None = None) -> torch.Tensor:
        return model.logits(model.language_forward(visual, batch.tokens, has_image))

    assert torch.equal(logits(), model.language(batch.tokens).logits)
    for gate in gates.values():
        gate.fill_(0.7)
        assert (logits() - plain).abs().max() > 1e-2
        close(logits(torch.zeros(3, dtype=torch.bool)), plain)
        gate.zero_()


# -- depths, bad input, maps -------------------------------------------------------------------------------------


def depths_of(fusion: str, **changes: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Encoder layers, fused LLM layers, number of visual tokens."""
    model = meta_model(tiny.model_config(fusion, **changes))
    return model.encoder_depths, model.fusion.depths, model.num_visual


def test_each_takes_the_depths_that_it_is_known_for() -> None:
    assert depths_of("deepstack") == ((1, 3), (1,), 16)
    assert depths_of("deepstack", encoder_layers=[1, 2, 4], llm_layers=[0, 2]) == ((1, 2, 4), (0, 2), 16)
    assert depths_of("gated_cross_attention") == ((3,), (1, 3), 16)
    assert depths_of("gated_cross_attention", encoder_layers="later") == ((3,), (1, 3), 16)
    assert depths_of("gated_cross_attention", encoder_layers=[4], llm_layers=[0, 1, 3]) == ((4,), (0, 1, 3), 16)
    assert depths_of("q_former", num_query_tokens=7) == ((3,), (), 7)
    assert depths_of("q_former", encoder_layers=[4]) == ((4,), (), 64)


@torch.no_grad()
def test_turned_round_deepstack_adds_deep_features_first_and_the_deepest_still_enter() -> None:
    config = replace(tiny.model_config("deepstack"), encoder_layer_ratio=0.75)
    batch = tiny.batch(2)
    straight = init_model(config, 0)
    turned = init_model(replace(config, pairing="deep_to_shallow"), 0)
    shallow, deeper, deepest = straight.encode_images(batch.pixels)
    again = straight.language_forward([deeper, shallow, deepest], batch.tokens)
    assert torch.equal(turned.language_forward(turned.encode_images(batch.pixels), batch.tokens), again)
    assert not torch.equal(straight.language_forward([shallow, deeper, deepest], batch.tokens), again)


@pytest.mark.parametrize(
    ("fusion", "changes", "message"),
    [
        ("deepstack", {"encoder_layers": [3]}, "two or more encoder layers, each once, and these are .3.: set model"),
        ("deepstack", {"encoder_layers": "last"}, r"each once, and these are \[3, 3\]"),
        ("deepstack", {"encoder_layers": [2, 3, 3]}, "each once"),
        ("deepstack", {"encoder_layer_ratio": 0.1}, "raise model.encoder_layer_ratio"),
        ("deepstack", {"encoder_layers": [1, 2], "llm_layers": [1, 2]}, "has 2 layers, and 1 encoder layers feed"),
        ("deepstack", {"encoder_layers": [1, 2], "llm_layers": [4]}, "the LLM's layers are 0 to 3"),
        ("gated_cross_attention", {"encoder_layers": [2, 3]}, r"takes one, such as \[4\], for all fused"),
        ("gated_cross_attention", {"encoder_layers": [5]}, "the encoder's layers are 1 to 4"),
        ("q_former", {"encoder_layers": [2, 3]}, "fusion=q_former takes one, such as"),
        ("q_former", {"llm_layers": [1]}, "fusion=q_former fuses no LLM layers"),
        ("q_former", {"num_query_tokens": 0}, "model.num_query_tokens=0: set it to 1 or more"),
        ("q_former", {"num_query_layers": -1}, "model.num_query_layers=-1: set it to 1 or more"),
    ],
)
def test_what_a_fusion_cannot_be_is_refused(fusion: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depths_of(fusion, **changes)


def test_an_llm_too_shallow_for_the_stack_is_refused() -> None:
    config = tiny.model_config("deepstack", encoder_layer_ratio=1.0)
    shallow = PartConfig(config=tiny.language(num_hidden_layers=3))
    with pytest.raises(
        ValueError, match="features of 3 depths cannot be added behind the first of 3 LLM layers: lower"
    ):
        meta_model(replace(config, language=shallow))


def test_maps_are_of_patches_or_refused() -> None:
    pixels, ids = tiny.batch(2).pixels[0], [1, 5, 6, 7]
    for fusion in NEW:
        model = init_model(tiny.model_config(fusion), 0).eval()
        if fusion == "q_former":
            with pytest.raises(ValueError, match="QFormer has no attention over patches"):
                attention_maps(model, pixels, ids, [("word", [2])], "word")
            with pytest.raises(ValueError, match="QFormer has no attention maps"):
                model.attention(model.encode_images(pixels[None]), torch.tensor([ids]), [1])
            continue
        shown = attention_maps(model, pixels, ids, [("word", [2])], "word")
        assert sorted(shown.maps) == ([1, 2, 3, 4] if fusion == "deepstack" else [2, 4])
        assert all(len(weights) == NUM_PATCHES for (weights,) in shown.maps.values())


@pytest.mark.parametrize("fusion", NEW)
def test_none_is_a_llava_and_each_has_a_line_for_its_model_card(fusion: str, tmp_path: Path) -> None:
    config = tiny.model_config(fusion)
    with pytest.raises(ValueError, match=f"a {fusion} model is not a LLaVA"):
        export_llava(config, {}, tmp_path, None, "resize")
    listed = replace(config, encoder_layers=[1, 2] if fusion == "deepstack" else [4])
    lines = {FUSIONS[fusion].describe(one) for one in (config, listed)}
    assert len(lines) == 2
    assert all(line.startswith(fusion) for line in lines)


def test_gates_of_a_layer_and_of_its_feed_forward_are_told_apart() -> None:
    cell = Cell("one", fusion="gated_cross_attention")
    with session() as world:
        engine, model = opened(cell, world, "")
        engine.step(my_batches(cell, 0, world), 1.0)
        found = layer_grad_rms(model, engine.fragments(), 1, lambda *_: 0.0, world)["gates"]
    assert found.keys() == {"0", "0.feed_forward", "1", "1.feed_forward"}
    for name, value in found.items():
        assert value == pytest.approx(math.tanh(float(model.get_parameter(f"fusion.layers.{name}.gate").detach())))
        assert value != pytest.approx(math.tanh(0.5), abs=1e-6), "it has moved"


@pytest.mark.parametrize("fusion", NEW)
def test_an_adapter_of_the_llm_leaves_the_fusion_as_it_is(fusion: str) -> None:
    stage = replace(stage_of(2, fusion, 1), adapter=AdapterConfig(rank=2), ema=0.9)
    plain, _ = for_stage(model_of(fusion), stage_of(2, fusion, 1))
    model, groups = for_stage(model_of(fusion), stage)
    trained = {name for group in groups for name in group.parameters}
    adapted = {name for name in trained if name.startswith("language.")}
    assert adapted
    assert all("lora" in name for name in adapted if ".layers." in name)
    new = {name for name, _ in plain.named_parameters() if name.startswith(("projector.", "fusion."))}
    assert (
        trained - adapted == new == {n for n, _ in model.named_parameters() if n.startswith(("projector.", "fusion."))}
    )


# -- plans and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["q_former", *(pytest.param(one, marks=pytest.mark.slow) for one in NEW[:2])])
def test_the_paper_is_planned_for_one_card(fusion: str, tmp_path: Path) -> None:
    """In the stage that needs the most memory, at the preset's micro-batch, which is the largest that fits."""
    words = ["--preset", "rtx3090", f"fusion={fusion}", "--gpu", "rtx3090", "--json", f"output={tmp_path}/run"]
    command = [sys.executable, "launchers/plan.py", *words, "--stage", "joint", "engine.compile=false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (joint,) = json.loads(done.stdout)["stages"]
    assert joint["fits"]
    parts = {"deepstack": {"projector"}, "gated_cross_attention": {"projector", "fusion"}, "q_former": {"projector"}}
    assert parts[fusion] == joint["components"].keys() & {"projector", "fusion"}


def losses_from(engine: Engine, cell: Cell, world: World) -> list[float]:
    """Losses of the steps after three, before them one of an evaluation, without dropout and graph."""
    total, count = engine.evaluate(my_batches(cell, 0, world))
    return [total / count] + [engine.step(my_batches(cell, step, world), factor(step)).loss for step in range(3, STEPS)]


def saved(world: World, cells: list[Cell], folder: str, out: Path) -> dict[str, list[float]]:
    """Checkpoints after three steps of each cell, and its losses from there."""
    found = {}
    for cell in cells:
        engine, _ = opened(cell, world, folder)
        for step in range(3):
            engine.step(my_batches(cell, step, world), factor(step))
        path = out / f"{cell.engine} {cell.fusion}"
        Checkpointer(path, world).save(3, engine.fragments(), {"step": 3}, wait=True)
        found[path.name] = losses_from(engine, cell, world)
    return found


def resumed(world: World, cells: list[Cell], folder: str, out: Path, sources: list[str]) -> dict[str, list[float]]:
    """Losses after the checkpoint of each of `sources`, by source and target, with fresh engines."""
    found = {}
    for cell in cells:
        for name in sources:
            if name.split(" ")[1] != cell.fusion:
                continue
            engine, _ = opened(cell, world, folder)
            list(engine.fragments())
            store = Checkpointer(out / name, world)
            path = store.latest()
            assert path is not None
            engine.after_load(int(store.load(path, engine.fragments())["step"]))
            found[f"{name} to {cell.engine}"] = losses_from(engine, cell, world)
    return found


ONE, TWO = (1, ("one",)), (2, ("fsdp",))
ALL = (ONE, (2, ("ddp", "fsdp")), (2, ("zero2",)), (2, ("zero3",)))


@pytest.mark.parametrize(
    ("sources", "targets"), [([ONE], [TWO]), pytest.param(ALL, ALL, marks=pytest.mark.slow)], ids=["two engines", "all"]
)
def test_a_checkpoint_goes_on_under_another_engine(tmp_path: Path, sources: Any, targets: Any) -> None:
    small_jsons(tmp_path)
    expected: dict[str, list[float]] = {}
    for size, engines in sources:
        cells = [Cell(engine, 3, fusion) for engine in engines for fusion in NEW]
        expected |= ranks.run(saved, size, cells, str(tmp_path), tmp_path)[0]
    for size, engines in targets:
        cells = [Cell(engine, 3, fusion) for engine in engines for fusion in NEW]
        for pair, losses in ranks.run(resumed, size, cells, str(tmp_path), tmp_path, list(expected))[0].items():
            assert losses == pytest.approx(expected[pair.split(" to ")[0]], rel=3e-6), pair
