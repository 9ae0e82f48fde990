"""Exact FLOPs of a stage, from forward passes of its model on fake tensors: the LLM's at three text lengths.

A matrix product of n multiply-adds counts 2 n FLOPs. The gradient of a weight is computed if the weight trains, that
of an input if anything before it trains; a frozen encoder thus costs only its forward. Attention counts as the full
square, causal or not, as in `torch.utils.flop_counter`; norms and activations count nothing. For a text of T tokens
every operator of the LLM costs a + b T + c T^2, so three traces determine the cost at every length; the image's cost
does not depend on the text, and the head's is proportional to the targets, so one trace of each does.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hive_scale.config import CheckpointingConfig, ModelConfig, StageConfig
from hive_scale.model import build
from hive_scale.plan.trace import FORMULAS, fake_parameters

log = logging.getLogger(__name__)
LENGTHS = (8, 16, 24)  # tokens of the traced texts; any three lengths do
PARTS = ("vision", "language", "projector", "fusion")
ATTENTION = "scaled_dot_product"  # part of fused kernels' names; these recompute the scores in backward


@dataclass(frozen=True)
class Flops:
    """FLOPs of one part of the work. Recomputation counts for the hardware, not for the model."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0  # by activation checkpointing, and of attention scores in backward

    @property
    def model(self) -> float:
        """FLOPs the model requires, without recomputation: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """FLOPs actually computed, with recomputation: the numerator of HFU."""
        return self.model + self.recompute

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage as a function of the batch.

    `by_component` maps each component to coefficients (4, 3): of 1, T, T^2 and targets, for forward, backward and
    recompute of one sample.
    """

    by_component: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]

    def components(self, samples: float, num_tokens: float, targets: float) -> dict[str, Flops]:
        """FLOPs by component for `samples` texts padded to `num_tokens`, with `targets` target tokens in total."""
        sizes = np.array([samples, samples * num_tokens, samples * num_tokens**2, targets])
        return {name: Flops(*(sizes @ table).tolist()) for name, table in self.by_component.items()}

    def without(self, component: str) -> Work:
        """Return the same work without that of `component`, which does not run."""
        return Work({name: table for name, table in self.by_component.items() if name != component})

    def total(self, samples: float, num_tokens: float, targets: float) -> Flops:
        """FLOPs of all components together; arguments as in `components`."""
        return sum(self.components(samples, num_tokens, targets).values(), Flops())


def estimate(config: ModelConfig, stage: StageConfig, checkpointing: CheckpointingConfig) -> Work | None:
    """Return the work of a stage for a running job; None, with a warning, if the model cannot be traced."""
    try:
        return count(build.for_stage(config, stage)[0], checkpointing)
    except Exception as error:  # a registered model may raise anything here, and training does not need the estimate
        log.warning("the model's FLOPs cannot be counted, and MFU is not shown: %s: %s", type(error).__name__, error)
        return None


def count(model: Any, checkpointing: CheckpointingConfig | None = None) -> Work:
    """Return the work of `model`, a Hive on the meta device, ``requires_grad`` set. It is unusable afterwards."""
    size, counter, counted = model.vision.config.image_size, _Counter(), []
    with FakeTensorMode(), _counting(model, counter, checkpointing):
        fake_parameters(model, torch.float32)
        visual = model.encode_images(torch.empty((1, 3, size, size), dtype=torch.uint8))
        counted.append(counter.take())
        for length in LENGTHS:
            hidden = model.language_forward(visual, torch.empty((1, length), dtype=torch.long))
            counted.append(counter.take())
        model.token_loss(hidden[0, :1], torch.empty((1,), dtype=torch.long))
        image, *texts, target = [*counted, counter.take()]
    powers = np.array([[1, length, length**2] for length in LENGTHS], dtype=np.float64)
    tables = {}
    for part in PARTS:
        of_text = np.linalg.solve(powers, np.array([one[part] for one in texts]))
        of_text[0] += image[part]
        tables[part] = np.vstack([of_text, target[part]])
    return Work(tables)


def encoder_flops(model: Any) -> float:
    """FLOPs of the encoder's forward for one image; `model` as for `count`."""
    size = model.vision.config.image_size
    counter = _Counter()
    with FakeTensorMode():
        fake_parameters(model, torch.float32)
        with counter:
            model.encode(torch.empty((1, 3, size, size), dtype=torch.uint8))
    return float(sum(counter.done.values())[0])


@contextmanager
def _counting(model: Any, counter: _Counter, checkpointing: CheckpointingConfig | None) -> Iterator[None]:
    """Let `counter` count what runs, by component."""
    pieces = {getattr(model, part): part for part in PARTS}
    settings = checkpointing or CheckpointingConfig()
    blocks = {
        block: getattr(settings, component) == "full" for component, found in model.blocks().items() for block in found
    }
    with _watching(model, pieces, blocks, counter), saved_tensors_hooks(counter.saved, _no_backward), counter:
        yield


class _Counter(TorchDispatchMode):
    """Adds up every operator's forward FLOPs, and its backward FLOPs by which of its inputs require a gradient."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: dict[str, Any] = defaultdict(lambda: np.zeros(3))
        self.part = "language"  # component whose operators run now
        self.block: list[float] = []  # of the running block: FLOPs so far, and FLOPs up to its last saved tensor

    def take(self) -> Mapping[str, Any]:
        """(forward, backward, recompute) by component since the last call."""
        done, self.done = self.done, defaultdict(lambda: np.zeros(3))
        return done

    def saved(self, _: Tensor) -> None:
        """Note that a tensor is saved for backward: recomputation of the block must run at least up to here."""
        # nothing is handed back for the graph to keep: no backward follows, and a kept output would never be freed
        if self.block:
            self.block[1] = self.block[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            cost = formula(*args, **(kwargs or {}), out_val=out)
            self.done[self.part] += cost * np.array([1.0, *_backward(func, args, kwargs or {})])
            if self.block:
                self.block[0] += cost
        return out


def _no_backward(_: Any) -> Tensor:
    raise AssertionError("FLOPs are counted in a forward alone")


def _backward(func: Any, args: Any, kwargs: Any) -> tuple[float, float]:
    """(backward, recompute) in units of the forward's cost: one product per factor that needs a gradient."""
    factors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.requires_grad]
    if ATTENTION in func.__name__:
        return (2.0, 0.5) if factors else (0.0, 0.0)
    return float(sum(one.ndim > 1 for one in factors)), 0.0  # a bias is not a factor


@contextmanager
def _watching(
    model: nn.Module, pieces: Mapping[nn.Module, str], blocks: Mapping[nn.Module, bool], counter: _Counter
) -> Iterator[None]:
    """Tell `counter` which component runs, and add to it what checkpointed blocks would recompute."""

    def entering(part: str) -> Callable[..., None]:
        def enter(_: nn.Module, __: Any) -> None:
            counter.part = part

        return enter

    def begin(_: nn.Module, __: Any) -> None:
        counter.block = [0.0, 0.0]

    def end(_: nn.Module, __: Any, output: Any) -> None:
        if any(one.requires_grad for one in tree_leaves(output) if isinstance(one, Tensor)):
            counter.done[counter.part][2] += counter.block[1]
        counter.block = []

    handles = []
    for piece, part in pieces.items():
        handles += [module.register_forward_pre_hook(entering(part)) for module in piece.modules()]
    for block, is_checkpointed in blocks.items():
        if is_checkpointed:
            handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
