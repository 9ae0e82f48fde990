"""FLOPs of a stage, exactly: a walk over the model's layers that knows what is frozen.

A matrix product of n multiply-adds is 2 n FLOPs. Its weight's gradient is computed where the weight trains, its
input's where anything before it does; so a frozen encoder costs its forward alone. Attention is counted as the
full square, causal or not, as `torch.utils.flop_counter` does; norms and activations count nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hive_scale.config import CheckpointingConfig
from hive_scale.model.fusion import Concat
from hive_scale.model.projector import Projector


@dataclass(frozen=True)
class Flops:
    """FLOPs of one part of the work. What is computed a second time counts for the hardware, not for the model."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0  # by activation checkpointing, and of attention scores in backward

    @property
    def model(self) -> float:
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        return self.model + self.recompute

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)


@dataclass(frozen=True)
class Length:
    """Tokens per sample of a sequence: a constant number, and perhaps those of the text."""

    fixed: int = 0
    text: int = 0

    def at(self, num_tokens: float) -> float:
        return self.fixed + self.text * num_tokens


@dataclass
class _Product:
    """A matrix product: `macs` multiply-adds per row, or per pair of row and key."""

    macs: int
    rows: Length | None  # None: the rows that carry a target
    keys: Length | None = None
    backward: int = 0  # products of its size in backward
    again: float = 0.0  # what of it is computed a second time


@dataclass
class Counter:
    """FLOPs of a stage for any batch. Made once, from the model as `freeze` left it, before an engine wraps it."""

    products: dict[str, list[_Product]] = field(default_factory=dict)

    def components(self, samples: float, num_tokens: float, targets: float) -> dict[str, Flops]:
        """By component, for `samples` captions padded to `num_tokens`, `targets` tokens to predict in all."""
        result = {}
        for component, products in self.products.items():
            total = [0.0, 0.0, 0.0]
            for one in products:
                size = 2.0 * one.macs * (targets if one.rows is None else samples * one.rows.at(num_tokens))
                size *= one.keys.at(num_tokens) if one.keys else 1.0
                for place, times in enumerate((1, one.backward, one.again)):
                    total[place] += times * size
            result[component] = Flops(*total)
        return result

    def without(self, component: str) -> Counter:
        """The same work, but that of a component which is not run."""
        return Counter({name: products for name, products in self.products.items() if name != component})

    def total(self, samples: float, num_tokens: float, targets: float) -> Flops:
        return sum(self.components(samples, num_tokens, targets).values(), Flops())


def count(model: Any, checkpointing: CheckpointingConfig | None = None) -> Counter:
    """Walk `model` (a Hive, on any device, ``requires_grad`` set) in the order of its forward."""
    return _Walk(model, checkpointing or CheckpointingConfig()).counter


class _Walk:
    """`flows`, all through: whether a gradient is wanted of what has been computed so far."""

    def __init__(self, model: Any, checkpointing: CheckpointingConfig) -> None:
        self.model, self.checkpointing = model, checkpointing
        self.counter = Counter({part: [] for part in ("vision", "projector", "fusion", "language")})
        self.visual, self.text = Length(model.num_patches), Length(0, 1)
        self._read(self._project(self._see()))

    def _see(self) -> dict[int, bool]:
        """The encoder up to its deepest selected depth; which depths pass a gradient on."""
        vision, depths = self.model.vision, self.model.encoder_depths
        tokens = Length(self.visual.fixed + hasattr(vision.embeddings, "class_embedding"))
        patch = vision.embeddings.patch_embedding
        self._product("vision", patch, self.visual, False)
        flows = any(parameter.requires_grad for parameter in vision.embeddings.parameters())
        flows = flows or (hasattr(vision, "pre_layrnorm") and _trains(vision.pre_layrnorm))
        found = {0: flows}
        for depth in range(1, max(depths) + 1):
            block = vision.encoder.layers[depth - 1]
            attention, mlp = block.self_attn, block.mlp
            first = len(self.counter.products["vision"])
            inner = self._attention(
                "vision", attention, attention.out_proj, tokens, tokens, flows or _trains(block.layer_norm1)
            )
            inner = inner or flows or _trains(block.layer_norm2)
            inner = self._product("vision", mlp.fc1, tokens, inner)
            inner = self._product("vision", mlp.fc2, tokens, inner)
            found[depth] = flows = inner or flows
            self._checkpoint("vision", self.counter.products["vision"][first:-1], flows)
        return found

    def _project(self, flows: Mapping[int, bool]) -> list[bool]:
        passed = []
        for projector, depth in zip(self.model.projector, self.model.encoder_depths, strict=True):
            first = len(self.counter.products["projector"])
            inner = short = flows[depth]
            if isinstance(projector, Projector):  # the baseline's has neither norm nor shortcut
                inner = short = inner or _trains(projector.norm)
                if isinstance(projector.shortcut, nn.Linear):
                    short = self._product("projector", projector.shortcut, self.visual, inner)
            inner = self._product("projector", projector.up, self.visual, inner)
            inner = self._product("projector", projector.down, self.visual, inner)
            passed.append(inner or short)
            self._checkpoint("fusion", self.counter.products["projector"][first:-1], passed[-1])
        return passed

    def _read(self, visual: Sequence[bool]) -> None:
        model = self.model
        concat = isinstance(model.fusion, Concat)
        stream = Length(self.visual.fixed, 1) if concat else self.text
        flows = _trains(model.language.model.embed_tokens) or (concat and visual[0])
        for depth, layer in enumerate(model.language.model.layers):
            keys, extra = stream, False
            if depth in model.fusion.depths:
                index = model.fusion.depths.index(depth)
                fused = model.fusion.layers[index]
                if hasattr(fused, "q_proj"):
                    flows = self._cross(fused, flows, visual[index])
                else:
                    keys, extra = Length(self.visual.fixed, 1), self._keys(fused, visual[index])
            flows = self._layer(layer, stream, keys, flows, extra)
        self._product("language", model.language.lm_head, None, flows or _trains(model.language.model.norm))

    def _cross(self, layer: Any, flows: bool, visual: bool) -> bool:
        """An injected layer: text asks, the image answers."""
        products = self.counter.products["fusion"]
        first, normed = len(products), _trains(layer.norm)
        query = self._product("fusion", layer.q_proj, self.text, flows or normed)
        key = self._product("fusion", layer.k_proj, self.visual, visual or normed)
        value = self._product("fusion", layer.v_proj, self.visual, visual or normed)
        inner = self._scores("fusion", layer.q_proj, self.text, self.visual, query or key or value)
        inner = self._product("fusion", layer.o_proj, self.text, inner)
        inner = inner or layer.gate.requires_grad
        # a gate that trains wants what it is multiplied with: then the last product is made again, too
        self._checkpoint("fusion", products[first : None if layer.gate.requires_grad else -1], inner or flows)
        return inner or flows

    def _keys(self, layer: Any, visual: bool) -> bool:
        """Visual keys and values for a host layer."""
        products = self.counter.products["fusion"]
        first, inner = len(products), visual or _trains(layer.norm)
        key = self._product("fusion", layer.k_proj, self.visual, inner)
        value = self._product("fusion", layer.v_proj, self.visual, inner)
        self._checkpoint("fusion", products[first:-1], key or value)
        return key or value

    def _layer(self, layer: Any, rows: Length, keys: Length, flows: bool, extra: bool) -> bool:
        products = self.counter.products["language"]
        first, attention, mlp = len(products), layer.self_attn, layer.mlp
        inner = flows or _trains(layer.input_layernorm)
        inner = self._attention("language", attention, attention.o_proj, rows, keys, inner, extra)
        inner = inner or flows or _trains(layer.post_attention_layernorm)
        gate = self._product("language", mlp.gate_proj, rows, inner)
        up = self._product("language", mlp.up_proj, rows, inner)
        inner = self._product("language", mlp.down_proj, rows, gate or up)
        self._checkpoint("language", products[first:-1], inner or flows)
        return inner or flows

    def _attention(
        self, part: str, attention: Any, out: nn.Linear, rows: Length, keys: Length, flows: bool, extra: bool = False
    ) -> bool:
        """Projections of `rows`, scores over `keys`; `extra`: keys from elsewhere want a gradient."""
        wanted = [self._product(part, getattr(attention, name), rows, flows) for name in ("q_proj", "k_proj", "v_proj")]
        inner = self._scores(part, attention.q_proj, rows, keys, any(wanted) or extra)
        return self._product(part, out, rows, inner)

    def _product(self, part: str, module: Any, rows: Length | None, flows: bool) -> bool:
        weight = module.weight
        self.counter.products[part].append(_Product(weight.numel(), rows, backward=flows + weight.requires_grad))
        return flows or _trains(module)

    def _scores(self, part: str, query: nn.Linear, rows: Length, keys: Length, flows: bool) -> bool:
        """Scores and their mixture of values: 2 products; 4 in backward, which computes the scores again."""
        product = _Product(2 * query.out_features, rows, keys, 2 * flows, 0.5 * flows)
        self.counter.products[part].append(product)
        return flows

    def _checkpoint(self, component: str, products: Sequence[_Product], flows: bool) -> None:
        """All but the last product of a block: its result is wanted by nobody in backward."""
        if getattr(self.checkpointing, component) == "full" and flows:
            for product in products:
                product.again += 1


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
