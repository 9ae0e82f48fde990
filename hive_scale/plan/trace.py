"""One forward and backward of the real model on fake tensors: bytes alive at every operator, and FLOPs.

Nothing is computed and no memory is used, so a model of any size is traced in seconds on any machine; a change
of the model is a change of its plan. What an engine adds to it is arithmetic on the events noted here.
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
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from hive_scale.config import CheckpointingConfig
from hive_scale.engine.activation_checkpointing import checkpoint_blocks

# Bytes that scale with the micro-batch are told from others by this prime factor, which no width has.
SAMPLES = 1009


class Event(NamedTuple):
    """At operator `at`: a module or a parameter has reached a point that engines act on."""

    at: int
    kind: str  # "forward", "forward end", "backward", "backward end"; of a parameter: "gradient"
    name: str


@dataclass
class Trace:
    """Bytes alive at every operator that forward and backward made: ``fixed + micro_batch * per_sample``.

    Parameters, buffers, the batch itself and accumulated gradients are not among them.
    """

    fixed: list[int] = field(default_factory=list)
    per_sample: list[float] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    flops: dict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # per sample: "forward", "backward", "recompute"
    input_bytes: float = 0.0  # of the batch, per sample
    traffic: float = 0.0  # bytes that operators without FLOPs read and write, per sample
    kernels: int = 0  # operators that compute anything


def trace(
    model: Any,
    dtype: torch.dtype,
    num_tokens: int,
    image: tuple[Sequence[int], torch.dtype],
    checkpointing: CheckpointingConfig,
    saves_inputs: bool = False,
) -> Trace:
    """Trace `model` (on the meta device, ``requires_grad`` set) with `num_tokens` per caption, all but one targets.

    `image` is what a batch has of one: shape and dtype of pixels, or of features. `saves_inputs`: linear layers
    keep their input whether or not their weight needs it, as under ZeRO-3. The model is left with fake parameters:
    build another one for training.
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
            block.__dict__.pop("forward", None)  # what checkpointing wrapped
    return result


class _Recorder(TorchDispatchMode):
    """Follows every storage from its making to its end."""

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
        """A gradient is whole: from here on it is the engine's."""
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
        """Whether the storage of `tensor` is new."""
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
            # autograd computes with gradients off, a block that forgot its activations with gradients on
            again = self.phase == "backward" and torch.is_grad_enabled()
            self.result.flops["recompute" if again else self.phase] += formula(*args, **kwargs, out_val=out) / SAMPLES


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products of (B, heads, queries, keys); shapes (B, heads, N, h), fewer heads of keys under GQA."""
    samples, heads, queries, width = query
    keys, value_width = key[2], value[3]
    return int(2 * samples * heads * queries * keys * (width + value_width))


def _attention_backward_flops(out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Five: the scores once more, and the gradients of scores, queries, keys and values."""
    samples, heads, queries, width = query
    keys, value_width = key[2], value[3]
    return int(2 * samples * heads * queries * keys * (3 * width + 2 * value_width))


# torch has no formula for the CPU's attention, and would count none
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    operator: shape_wrapper(formula)  # type: ignore[no-untyped-call]
    for operator, formula in CPU_ATTENTION.items()
}


def fake_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """In a FakeTensorMode, give `model` parameters and buffers with a device and no memory; tied ones stay tied."""
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
    """In a FakeTensorMode, what a Hive takes; `shape` and `dtype` are of an image, `targets` of a sample."""
    return {
        "pixels": torch.empty((samples, *shape), dtype=dtype),
        "tokens": torch.empty((samples, num_tokens), dtype=torch.long),
        "target_rows": torch.empty((samples * targets,), dtype=torch.long),
        "target_ids": torch.empty((samples * targets,), dtype=torch.long),
    }


class _End(torch.autograd.Function):
    """Identity; its backward runs when the gradients of a module's inputs are known."""

    @staticmethod
    def forward(ctx: Any, done: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.done = done
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.done()
        return None, *gradients


def _watch(model: nn.Module, recorder: _Recorder) -> Iterator[Any]:
    """Note where every module with parameters of its own, and every block, begins and ends."""
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
    """ZeRO-3's linear: it keeps input and weight as they came, and computes what is asked for."""

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
