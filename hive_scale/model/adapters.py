"""Adapters: small trained modules around frozen linear layers, for one stage; merged into the weights at its end.

While a stage with an adapter is trained, the base weights of the parts that it adapts are frozen, so that step
checkpoints hold the adapter alone. Its weights are those of a plain model again: later stages, exports and probes know
nothing of adapters.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hive_scale.config import AdapterConfig
from hive_scale.registry import ADAPTERS

if TYPE_CHECKING:
    from peft import LoraConfig  # imported where it is used: that takes half a second, in every process

LAYER = "layer"  # name of a linear layer that is adapted by itself


class Adapter(ABC):
    """Base class of adapters; a subclass is registered in `ADAPTERS` under its ``stages.*.adapter.kind``."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    @abstractmethod
    def wrap(self, owner: nn.Module, names: Sequence[str], is_meta: bool) -> None:
        """Wrap each linear layer of `owner` that `names` has, in place.

        The layer's own parameters stay the same objects. With `is_meta` the new ones are on the meta device, else they
        are drawn by torch's random numbers such that the output is that of the layer.
        """

    @abstractmethod
    def merged_weight(self, layer: nn.Module) -> Tensor:
        """Weight (out, in) of the plain linear layer that computes what the wrapped `layer` does."""

    def save(self, names: Sequence[str], tensors: Mapping[str, Tensor], path: Path, is_llm: bool) -> None:
        """Write the adapter of a part to the directory `path`, in the form that its library reads.

        `names` are those of the adapted layers and `tensors` the adapter's own by name, both without the part's name.
        Raises ValueError if there is no such form.
        """
        raise ValueError(f"an adapter of kind {self.config.kind} has no form of its own to be exported in")


@ADAPTERS.register("lora")
class Lora(Adapter):
    """W + (alpha / rank) B A, with A drawn and B zero at first (Hu et al. 2021)."""

    decomposes: ClassVar[bool] = False

    def wrap(self, owner: nn.Module, names: Sequence[str], is_meta: bool) -> None:
        from peft import inject_adapter_in_model

        for name in names:
            layer: Any = owner.get_submodule(name)
            if self.config.rank > (least := min(layer.in_features, layer.out_features)):
                raise ValueError(
                    f"adapter.rank={self.config.rank} is more than the {least} of {name}: set it to that, or far less"
                )
        inject_adapter_in_model(self._library_config(names), owner, low_cpu_mem_usage=is_meta)

    def merged_weight(self, layer: nn.Module) -> Tensor:
        of_peft: Any = layer
        of_peft.merge()
        weight: Tensor = of_peft.get_base_layer().weight
        return weight.detach()

    def save(self, names: Sequence[str], tensors: Mapping[str, Tensor], path: Path, is_llm: bool) -> None:
        self._library_config(names, "CAUSAL_LM" if is_llm else None).save_pretrained(str(path))
        state = {f"base_model.model.{name.replace('.default', '')}": tensor for name, tensor in tensors.items()}
        save_file(state, path / "adapter_model.safetensors", {"format": "pt"})

    def _library_config(self, names: Sequence[str], task: str | None = None) -> LoraConfig:
        from peft import LoraConfig

        config = self.config
        return LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_dora=self.decomposes,
            target_modules=list(names),
            task_type=task,
        )


@ADAPTERS.register("dora")
class Dora(Lora):
    """LoRA of the direction of W's rows, with their magnitudes trained beside it (Liu et al. 2024)."""

    decomposes = True


@dataclass(frozen=True)
class Adapted:
    """What an adapter has done to a model whose parameters are on the meta device."""

    adapter: Adapter
    layers: Mapping[str, Mapping[str, str]]  # by adapted layer: its own parameters' new names -> their names before
    added: frozenset[str]  # names of the adapter's parameters

    def base(self, names: Sequence[str]) -> set[str]:
        """Those of `names` that are no adapter's, in the parts that are adapted: they are frozen."""
        parts = self.parts()
        return {name for name in names if name.split(".")[0] in parts and name not in self.added}

    def parts(self) -> dict[str, tuple[list[str], list[str]]]:
        """Names of adapted layers and of the adapter's parameters, by part and without the part's name."""

        def of(part: str, names: Iterable[str]) -> list[str]:
            return [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")]

        parts = dict.fromkeys(name.split(".")[0] for name in self.layers)
        return {part: (of(part, self.layers), of(part, sorted(self.added))) for part in parts}


def adapt(model: Any, config: AdapterConfig) -> Adapted:
    """Wrap the linear layers that ``config.targets`` name, in the blocks of a Hive on the meta device, in place.

    Blocks that the forward never reads are left alone. Raises ValueError for a target that matches no such layer.
    """
    adapter: Adapter = ADAPTERS[config.kind](config)
    names = _targets(model, config.targets)
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    adapter.wrap(model, names, is_meta=True)
    after = dict(model.named_parameters())
    layers = {
        layer: {
            name: before[id(parameter)]
            for name, parameter in after.items()
            if name.startswith(f"{layer}.") and id(parameter) in before
        }
        for layer in names
    }
    return Adapted(adapter, layers, frozenset(name for name, one in after.items() if id(one) not in before))


def _targets(model: Any, globs: Sequence[str]) -> list[str]:
    """Names of the linear layers in the blocks of encoder and LLM that match `globs`, in the model's order."""
    unread = model.unused_parameters()
    blocks = {id(block) for part in ("vision", "language") for block in model.blocks()[part]}
    linear: list[str] = []
    for name, block in model.named_modules():
        if id(block) in blocks:
            linear += [f"{name}.{inner}" for inner, one in block.named_modules() if isinstance(one, nn.Linear)]
    linear = [name for name in linear if f"{name}.weight" not in unread]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in linear):
            kinds = sorted({f"{name.split('.')[0]}.*.{name.rpartition('.')[2]}" for name in linear})
            raise ValueError(
                f"adapter.targets: '{glob}' matches no linear layer of a block that is read: there are "
                f"{', '.join(kinds)}"
            )
    return [name for name in linear if any(fnmatchcase(name, glob) for glob in globs)]


class AdaptedWeights(Mapping[str, Tensor]):
    """Float32 weights of an adapted model by name: those it starts from, and the adapter's own, drawn from `seed`.

    Each layer's are drawn from the seed and its name, so that they are the same on every rank and in any order.
    """

    def __init__(self, adapted: Adapted, weights: Mapping[str, Tensor], seed: int) -> None:
        self._adapted, self._weights, self._seed = adapted, weights, seed
        self._moved = {new: old for names in adapted.layers.values() for new, old in names.items()}
        self._drawn: dict[str, Tensor] = {}  # of the last layer asked for

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._adapted.added:
            return self._weights[self._moved.get(name, name)]
        if name not in self._drawn:
            layer = next(layer for layer in self._adapted.layers if name.startswith(f"{layer}."))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed + zlib.crc32(layer.encode()))
                self._drawn = _tensors(layer, _wrapped(self._adapted, layer, self._weights))
        return self._drawn[name]

    def __iter__(self) -> Iterator[str]:
        moved = set(self._moved.values())
        return iter([*(name for name in self._weights if name not in moved), *self._moved, *self._adapted.added])

    def __len__(self) -> int:
        return len(self._weights) + len(self._adapted.added)


def merged_weight(
    adapted: Adapted, layer: str, weights: Mapping[str, Tensor], trained: Callable[[str], Tensor]
) -> Tensor:
    """The weight (out, in) of the plain linear layer `layer`: from the `weights` before, and what was `trained`."""
    owner = _wrapped(adapted, layer, weights)
    with torch.no_grad():
        for name, tensor in _tensors(layer, owner).items():
            if name in adapted.added:
                tensor.copy_(trained(name))
    return adapted.adapter.merged_weight(owner.get_submodule(LAYER))


def _wrapped(adapted: Adapted, layer: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """A module whose only child, `LAYER`, is the wrapped layer, float32 on the CPU, with the adapter newly drawn."""
    weight = weights[f"{layer}.weight"].float()
    bias = f"{layer}.bias" in adapted.layers[layer].values()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias:
        linear.bias = nn.Parameter(weights[f"{layer}.bias"].float(), requires_grad=False)
    owner = nn.Module()
    owner.add_module(LAYER, linear)
    adapted.adapter.wrap(owner, [LAYER], is_meta=False)
    return owner


def _tensors(layer: str, owner: nn.Module) -> dict[str, Tensor]:
    """The parameters of a layer that was wrapped by itself, under their names in the whole model."""
    return {layer + name.removeprefix(LAYER): one.detach() for name, one in owner.named_parameters()}
