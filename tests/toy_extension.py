"""A user's extension module: a fusion, an encoder family, an optimizer and an adapter of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTImageProcessor, ViTMSNModel

from hive_scale.config import ModelConfig, StageConfig
from hive_scale.engine.optimizer import OptimizerKind
from hive_scale.model.adapters import Adapter
from hive_scale.model.encoders import EncoderFamily
from hive_scale.model.fusion import Context, Fusion
from hive_scale.model.hosts import Host
from hive_scale.registry import ADAPTERS, ENCODERS, FUSIONS, OPTIMIZERS


class AddedMean(nn.Module):
    """H' = H + W mean(V): every token gets the mean patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_BTD: Tensor, visual_BVD: Tensor, has_image: Tensor | None) -> Tensor:
        update = self.proj(visual_BVD.mean(dim=1, keepdim=True))
        return hidden_BTD + (update if has_image is None else update * has_image[:, None, None])


@FUSIONS.register("toy_mean")
class ToyMean(Fusion):
    new_parameters = ("projector.*", "fusion.*")

    def __init__(self, host: Host, llm: nn.Module, num_features: int, config: ModelConfig) -> None:
        super().__init__(host, llm, num_features, config)
        width: Any = llm.config
        self.layers.extend(AddedMean(width.hidden_size) for _ in self.depths)

    def before_layer(self, depth: int, hidden_BND: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        if depth in self.depths:
            index = self.depths.index(depth)
            hidden_BND = self.layers[index](hidden_BND, context.visual[index], context.has_image)
        return hidden_BND, {"attention_mask": context.mask}

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        return ()


@ENCODERS.register("vit_msn")
class ToyVit(EncoderFamily):
    model, processor = ViTMSNModel, ViTImageProcessor
    num_leading = 1
    blocks_at = ("layers", "encoder.layer")

    def run_block(self, block: Any, hidden: Tensor, positions: Any) -> Tensor:
        done: Tensor = block(hidden)
        return done


@OPTIMIZERS.register("toy_sgd")
class ToySgd(OptimizerKind):
    states = ("momentum_buffer",)

    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.0, momentum=stage.betas[0])


class Scaled(nn.Module):
    """A linear layer, each of whose outputs has a factor."""

    def __init__(self, base: nn.Linear, device: str) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones(base.out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        done: Tensor = self.base(x) * self.scale
        return done


@ADAPTERS.register("toy_scale")
class ToyScale(Adapter):
    def wrap(self, owner: nn.Module, names: Sequence[str], is_meta: bool) -> None:
        for name in names:
            base: Any = owner.get_submodule(name)
            owner.set_submodule(name, Scaled(base, "meta" if is_meta else "cpu"))

    def merged_weight(self, layer: Any) -> Tensor:
        weight: Tensor = layer.scale[:, None] * layer.base.weight
        return weight.detach()
