"""Trace one forward and backward of the real model on fake tensors: bytes alive at every operator, and FLOPs.

Nothing is computed or allocated, so a model of any size is traced in seconds on any machine, and a change of the model
changes its plan. Engines add arithmetic on the events recorded here.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, shape_wrapper

from hive_scale.config import CheckpointingConfig
from hive_scale.engine.activation_checkpointing import checkpoint_blocks

# Traced micro-batch size: sizes divisible by this prime, which divides no width, scale with the micro-batch.
SAMPLES = 1009


class Event(NamedTuple):
    """A module or parameter reaches, at operator number `at`, a point on which engines act."""

    at: int
    kind: str  # of a module: "forward", "forward end", "backward", "backward end", "again"; parameter: "gradient"
    name: str


@dataclass(frozen=True)
class Input:
    """A tensor that a block was given: its shape, with `SAMPLES` samples, and what else its cost depends on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def real(self, samples: int) -> Tensor:
        """Zeros like it, of as many samples."""
        shape = [samples * (size // SAMPLES) if size % SAMPLES == 0 else size for size in self.shape]
        return torch.zeros(shape, dtype=self.dtype, requires_grad=self.requires_grad)


@dataclass
class Trace:
    """Bytes alive at every operator of forward and backward: ``fixed + micro_batch * per_sample``.

    Parameters, buffers, the batch itself and accumulated gradients are not included.
    """

    fixed: list[int] = field(default_factory=list)
    per_sample: list[float] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    # FLOPs per sample by phase: "forward", "backward", "recompute"
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    input_bytes: float = 0.0  # bytes of the batch, per sample
    traffic: float = 0.0  # bytes read and written by operators without FLOPs, per sample
    kernels: int = 0  # number of operators that compute something (views do not)
    # (args, kwargs) of each block's forward, with an `Input` for each tensor
    calls: dict[str, Any] = field(default_factory=dict)


def trace(
    model: Any,
    dtype: torch.dtype,
    num_tokens: int,
    image: tuple[Sequence[int], torch.dtype],
    checkpointing: CheckpointingConfig,
    saves_inputs: bool = False,
) -> Trace:
    """Trace `model` (on the meta device, ``requires_grad`` set) with `num_tokens` per caption, all but one targets.

    `image` is the shape and dtype of one image in a batch: pixels or features. `saves_inputs`: linear layers save
    their input even if their weight does not need it, as under ZeRO-3. The model is left with fake parameters; build
    another one for training.
    """
    checkpoint_blocks(model.blocks(), checkpointing)
    result = Trace()
    with FakeTensorMode(), _saving_linear() if saves_inputs else nullcontext():
        fake_parameters(model, dtype)
        inputs = fake_batch(SAMPLES, num_tokens, num_tokens - 1, *image)
        result.input_bytes = sum(tensor.nbytes for tensor in inputs.values()) / SAMPLES
        recorder = _Recorder(result)
        recorder.ignore([*model.parameters(), *model.buffers(), *inputs.values()])
        handles = list(_watch(model, recorder))
        with recorder:
            loss = model(**inputs)
            recorder.phase = "backward"
            torch.autograd.backward(loss)
            del loss
        for handle in handles:
            handle.remove()
    for blocks in model.blocks().values():
        for block in blocks:
            block.__dict__.pop("forward", None)  # removes the wrapper of activation checkpointing
    return result


class _Recorder(TorchDispatchMode):
    """Tracks every storage from allocation to release."""

    def __init__(self, result: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.result, self.phase = result, "forward"
        self.known: dict[int, Any] = {}
        self.fixed, self.scaled = 0, 0

    def ignore(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._follow(tensor, counted=False)

    def note(self, kind: str, name: str) -> None:
        self.result.events.append(Event(len(self.result.fixed), kind, name))

    def drop(self, parameter: Tensor, name: str) -> None:
        """Note that a gradient is complete: from here on the engine accounts for it."""
        self.note("gradient", name)
        parameter.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and self._follow(leaf)]
        if made or func._schema.is_mutable:
            self._count(func, args, kwargs or {}, out)
        self.result.fixed.append(self.fixed)
        self.result.per_sample.append(self.scaled / SAMPLES)
        return out

    def _follow(self, tensor: Tensor, counted: bool = True) -> bool:
        """Track the storage of `tensor`; True if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return False
        size = storage.nbytes() if counted else 0
        scaled = size % SAMPLES == 0
        self._add(size, scaled)

        def gone(_: Any) -> None:
            del self.known[key]
            self._add(-size, scaled)

        self.known[key] = weakref.ref(storage, gone)
        return True

    def _add(self, size: int, scaled: bool) -> None:
        if scaled:
            self.scaled += size
        else:
            self.fixed += size

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.result.kernels += 1
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None:
            tensors = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
            self.result.traffic += sum(tensor.nbytes for tensor in tensors) / SAMPLES
        else:
            # in backward, autograd runs with grad mode off, a recomputed block with grad mode on
            again = self.phase == "backward" and torch.is_grad_enabled()
            self.result.flops["recompute" if again else self.phase] += formula(*args, **kwargs, out_val=out) / SAMPLES


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of two products (B, heads, queries, keys). Shapes are (B, heads, N, h), with fewer key heads under GQA."""
    samples, heads, queries, width = query
    keys, value_width = key[2], value[3]
    return int(2 * samples * heads * queries * keys * (width + value_width))


def _attention_backward_flops(out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of five products: the scores again, and the gradients of scores, queries, keys and values."""
    samples, heads, queries, width = query
    keys, value_width = key[2], value[3]
    return int(2 * samples * heads * queries * keys * (3 * width + 2 * value_width))


# torch has no formula for attention on CPUs, and would count nothing
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    operator: shape_wrapper(formula)  # type: ignore[no-untyped-call]
    for operator, formula in CPU_ATTENTION.items()
}


def fake_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Within a FakeTensorMode, give `model` fake parameters and buffers, with no memory; tied ones stay tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                fake = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                made[parameter] = nn.Parameter(fake, parameter.requires_grad)
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def fake_batch(
    samples: int, num_tokens: int, targets: int, shape: Sequence[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Within a FakeTensorMode, return a Hive's inputs. `shape`, `dtype`: of one image; `targets`: per sample."""
    return {
        "pixels": torch.empty((samples, *shape), dtype=dtype),
        "tokens": torch.empty((samples, num_tokens), dtype=torch.long),
        "target_rows": torch.empty((samples * targets,), dtype=torch.long),
        "target_ids": torch.empty((samples * targets,), dtype=torch.long),
    }


class _End(torch.autograd.Function):
    """Identity whose backward runs when the gradients of a module's inputs are known."""

    @staticmethod
    def forward(ctx: Any, done: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.done = done
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.done()
        return None, *gradients


def _watch(model: nn.Module, recorder: _Recorder) -> Iterator[Any]:
    """Note the begin and end of every block, and of every module that owns parameters."""
    blocks = {block for part in model.blocks().values() for block in part}  # type: ignore[operator]
    for name, module in model.named_modules():
        if module in blocks or any(True for _ in module.parameters(recurse=False)):
            yield module.register_forward_pre_hook(_entering(name, recorder, module in blocks), with_kwargs=True)
            yield module.register_forward_hook(_leaving(name, recorder))
    parameters: list[tuple[str, Any]] = list(model.named_parameters())
    for name, parameter in parameters:
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(lambda grad, name=name: recorder.drop(grad, name))


def _entering(name: str, recorder: _Recorder, is_block: bool) -> Callable[..., Any]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recorder.phase == "backward":
            recorder.note("again", name)
            return None
        recorder.note("forward", name)
        if is_block:
            recorder.result.calls[name] = tree_map_only(
                Tensor, lambda one: Input(tuple(one.shape), one.dtype, one.requires_grad), (args, kwargs)
            )
        needing = [leaf for leaf in args if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not (is_block and needing):
            return None
        marked = iter(_End.apply(lambda: recorder.note("backward end", name), *needing))
        return tuple(next(marked) if any(leaf is one for one in needing) else leaf for leaf in args), kwargs

    return enter


def _leaving(name: str, recorder: _Recorder) -> Callable[..., None]:
    def leave(_: nn.Module, __: Any, output: Any) -> None:
        if recorder.phase == "backward":
            return
        recorder.note("forward end", name)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: recorder.note("backward", name))  # type: ignore[no-untyped-call]

    return leave


@contextmanager
def _saving_linear() -> Iterator[None]:
    plain = F.linear
    F.linear = _SavingLinear.apply
    try:
        yield
    finally:
        F.linear = plain


class _SavingLinear(torch.autograd.Function):
    """ZeRO-3's linear layer: always saves input and weight, computes only the gradients that are needed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        output = input.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        to_input = grad.matmul(weight) if needs_input else None
        to_weight = flat.t().matmul(input.flatten(0, -2)) if needs_weight else None
        to_bias = flat.sum(0) if bias is not None and needs_bias else None
        return to_input, to_weight, to_bias
