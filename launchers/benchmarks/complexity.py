"""Counted FLOPs of HIVE and of self-attention by image size and text length, beside the paper's formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

SIDES, TEXTS = (224, 256, 384, 512, 768), (16, 32, 77, 128, 256, 512)


def counted(preset: str, fusion: str, side: int, num_text: int) -> float:
    """GFLOP of one sample's forward on the LLM's side: projectors, fusion and LLM."""
    from hive_scale import presets
    from hive_scale.config import ModelConfig
    from hive_scale.model import build
    from hive_scale.plan.flops import count

    model: ModelConfig = presets.load(preset, None, [f"fusion={fusion}"]).model
    vision = replace(model.vision, config={**model.vision.config, "image_size": side})
    parts = count(build.meta_model(replace(model, vision=vision))).components(1, num_text, num_text - 1)
    return sum(part.forward for name, part in parts.items() if name != "vision") / 1e9


def draw(preset: str, path: Path) -> None:
    from matplotlib.figure import Figure

    from hive_scale import presets
    from hive_scale.plan.complexity import cross_attention_llm, self_attention_llm

    config = presets.load(preset, None, []).model
    language: dict[str, Any] = config.language.config
    width, layers = language["hidden_size"], language["num_hidden_layers"]
    selected, patch = (
        round(config.encoder_layer_ratio * config.vision.config["num_hidden_layers"]),
        config.vision.config["patch_size"],
    )
    sides = [side for side in SIDES if side % patch == 0] or [patch * n for n in (16, 24, 32, 48)]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, points, title in (
        (left, [(side, 77) for side in sides], "image's side, pixels (77 text tokens)"),
        (right, [(sides[len(sides) // 2], text) for text in TEXTS], "text tokens"),
    ):
        places = [side if axes is left else text for side, text in points]
        for fusion, label in (("concat", "self-attention"), ("cross_attention", "HIVE")):
            axes.loglog(places, [counted(preset, fusion, *point) for point in points], marker="o", label=label)
        for label, formula in (
            ("(4), scaled", lambda text, visual: self_attention_llm(text, visual, width, layers)),
            ("(5), scaled", lambda text, visual: cross_attention_llm(text, visual, width, layers, selected)),
        ):
            fusion = "concat" if label.startswith("(4)") else "cross_attention"
            costs = [formula(text, (side // patch) ** 2) for side, text in points]
            scale = counted(preset, fusion, *points[-1]) / costs[-1]
            axes.loglog(places, [scale * cost for cost in costs], linestyle=":", label=label)
        axes.set(xlabel=title, ylabel="GFLOP per sample, forward, without the encoder")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
