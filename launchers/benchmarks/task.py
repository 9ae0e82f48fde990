"""One case of the engine comparison: the model, its data, and the step that every contender takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # imported late at run time, so that --help answers at once
    from hive_scale.batch import Batch
    from hive_scale.config import Config, EngineConfig, ModelConfig, StageConfig
    from hive_scale.distributed import World
    from hive_scale.param_groups import ParamGroup

JSONS = Path(__file__).resolve().parents[2] / "ds_configs"
# case -> (title of the row, engine.shard_size, DeepSpeed JSON). ZeRO-3 replaces F.linear permanently, so each case
# runs in processes of its own
CASES = {
    "one": ("one process", 0, ""),
    "fsdp": ("FSDP2", 0, ""),
    "ddp": ("DDP", 1, ""),
    "zero2": ("ZeRO-2", 0, str(JSONS / "zero2.json")),
    "zero3": ("ZeRO-3", 0, str(JSONS / "zero3.json")),
}
ACCUMULATION, CLIP = 2, 0.05
Step = Callable[[Sequence["Batch"]], float]  # one optimizer step; returns the mean loss over all ranks' target tokens


@dataclass(frozen=True)
class Task:
    """Work of one case, the same for every contender."""

    config: ModelConfig
    stage: StageConfig
    engine: EngineConfig
    world: World
    model: Any  # with its initial weights; contenders copy it

    def build(self) -> tuple[Any, list[ParamGroup]]:
        """Return a copy of the model, frozen and grouped as the stage specifies."""
        from hive_scale.param_groups import apply_trainable_groups

        model = deepcopy(self.model)  # copied, since Transformers would partition a new one after a ZeRO-3 config
        return model, apply_trainable_groups(model, self.stage, model.unused_parameters())


def from_scratch(preset: str, words: Sequence[str]) -> Config:
    """Return the preset's config with `words` (key=value), and its model from random weights."""
    from hive_scale import presets

    config = presets.load(preset, None, list(words))
    parts = {name: replace(getattr(config.model, name), path="") for name in ("vision", "language")}
    return replace(config, model=replace(config.model, **parts))


def make_task(case: tuple[str, int, str], world: World, quick: bool) -> Task:
    """Stage `joint` of a HIVE whose step takes a core about a second.

    Sharding costs time per parameter, and computation hides it per token. The model is therefore small, and a
    micro-batch has 2,048 visual tokens, which is still less than a GPU would get.
    """
    import torch

    from hive_scale.config import EngineConfig, ModelConfig, PartConfig, StageConfig
    from hive_scale.model.build import init_model
    from hive_scale.presets import three_stages

    width, layers, micro_batch = (32, 2, 2) if quick else (192, 4, 8)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    vision = {"image_size": 32 if quick else 128, "patch_size": 8, "num_attention_heads": 4, "vision_use_head": False}
    language = {"vocab_size": 4096, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = ModelConfig(
        PartConfig(config={"model_type": "siglip_vision_model", **sizes, **vision}),
        PartConfig(config={"model_type": "llama", **sizes, **language}),
        encoder_layer_ratio=0.5,
    )
    groups = three_stages("cross_attention", (1e-2, 1e-2, 1e-2), llm=["language.*"])["joint"]
    global_batch = ACCUMULATION * micro_batch * world.size
    # so large an eps that a wrongly scaled or clipped gradient changes the next loss
    stage = StageConfig(groups, global_batch, micro_batch, max_grad_norm=CLIP, eps=1e-4)
    first = init_model(model, seed=0).to(world.device)
    with torch.no_grad():
        for fusion in cast(Any, first.fusion.layers):
            fusion.gate.fill_(0.5)  # so that images affect the loss from the first step
    return Task(model, stage, EngineConfig(shard_size=case[1], ds_config=case[2], compile=False), world, first)


def make_data(task: Task) -> list[list[Batch]]:
    """This rank's micro-batches of four steps: random images and captions of various lengths."""
    import torch

    from hive_scale.batch import Sample, collate

    random = torch.Generator().manual_seed(task.world.rank)
    image, vocabulary = task.config.vision.config["image_size"], task.config.language.config["vocab_size"]

    def sample() -> Sample:
        length = int(torch.randint(16, 49, (1,), generator=random))
        pixels = torch.randint(0, 256, (3, image, image), dtype=torch.uint8, generator=random)
        tokens = torch.randint(3, vocabulary, (length,), generator=random).tolist()
        return Sample("", pixels, tokens, [False] + [True] * (length - 1))

    def batch() -> Batch:
        return collate([sample() for _ in range(task.stage.micro_batch)], pad_id=0, image_size=image)

    return [[batch() for _ in range(ACCUMULATION)] for _ in range(4)]
