"""The native engine: unsharded (one process, or DDP), or with FSDP2 (FSDP and HSDP by one mesh: replicate, shard).

Unsharded, nothing is wrapped. In fp32 the parameters are the master weights, and DDP reduces gradients if there are
several ranks. In bf16 the masters are apart (`masters`). FSDP2 would copy every weight for nothing, and keep float32
masters of frozen parameters, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hive_scale.batch import Batch
from hive_scale.config import EngineConfig, StageConfig
from hive_scale.device import pins_memory
from hive_scale.distributed import Fragment, World
from hive_scale.engine import Loss, StateSharding, StepOutput, token_loss
from hive_scale.engine.accumulation import accumulate, evaluate_batches, reduce_loss
from hive_scale.engine.activation_checkpointing import blocks_of, checkpoint_blocks
from hive_scale.engine.compilation import compile_blocks, is_compiled
from hive_scale.engine.masters import MasterWeights, use_dtype
from hive_scale.engine.optimizer import make_optimizer, numels, optimizer_kind, set_learning_rate, set_steps
from hive_scale.node import use_cores
from hive_scale.param_groups import ParamGroup
from hive_scale.precision import DTYPES

# torch 2.14 renamed this argument of DDP, and warns about the old name
_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


class FsdpEngine:
    """Masters and moments are float32 shards; compute is in `config.precision`, gradient reduction in float32."""

    def __init__(
        self,
        model: Any,
        groups: Sequence[ParamGroup],
        stage: StageConfig,
        config: EngineConfig,
        world: World,
        weights: Mapping[str, Tensor],
    ) -> None:
        """Shard `model`, and fill it from `weights`. Its parameters are on the meta device, ``requires_grad`` set.

        Raises ValueError if `config.shard_size` does not divide the number of ranks.
        """
        self.model, self.world, self.config = model, world, config
        self.loss: Loss = token_loss
        self.max_grad_norm = stage.max_grad_norm
        self.kind = optimizer_kind(stage)
        groups = self.kind.divide(groups, model.matrices())
        kept = self.kind.kept_shapes(groups, {name: tuple(one.shape) for name, one in model.named_parameters()})
        checkpoint_blocks(model.blocks(), config.checkpointing)
        shard = config.shard_size or world.size
        if world.size % shard:
            raise ValueError(
                f"engine.shard_size={shard} does not divide the {world.size} processes: use a divisor of it"
            )
        compute = DTYPES[config.precision]
        plain = shard == 1 and not config.cpu_offload
        has_masters = plain and compute != torch.float32
        frozen = {one for one in model.parameters() if not one.requires_grad and config.frozen == "replicate"}
        if has_masters:
            use_dtype(model.parameters(), compute)
        if not plain:
            use_dtype(frozen, compute)
            self._shard(config, shard, frozen)
        # filled after sharding, shard by shard: the whole model may not fit on one device
        self._fill(weights, "cpu" if config.cpu_offload else world.device)
        self.masters = None
        if has_masters:
            self.masters = MasterWeights(model, groups, weights, world, flat=self.kind.cut == "elements")
        if not plain and not frozen:
            self._unshard_frozen_once()
        self.compiled = is_compiled(config, world.device.type)
        if self.compiled:
            compile_blocks(model)
        self._forward: Callable[..., Tensor] = model
        if plain and world.size > 1 and not has_masters:
            options: dict[str, Any] = {_BUFFERS: False}  # buffers are equal on all ranks and constant
            self._forward = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
        # under gradient accumulation (no sync) gradients stay unsharded, unless each micro-batch is reduced
        reduces = config.sync_each_micro_batch or stage.accumulation(world.size) == 1
        gradient_ranks = shard if reduces else 1
        trained = (compute.itemsize if has_masters else 4), shard
        held = (compute.itemsize, 1) if frozen else trained
        self.layout = StateSharding(*trained, *held, 4, gradient_ranks, 4 * has_masters, shard, numels(kept))
        if self.masters:
            self.optimizer = make_optimizer(self.masters.updated, self.masters.groups(groups), stage)
        else:
            self.optimizer = make_optimizer(dict(model.named_parameters()), groups, stage)
        if self.kind.ema:
            self._create_states()  # the average begins with the weights before the first step
        if config.cpu_offload:
            use_cores(world)

    def _shard(self, config: EngineConfig, shard: int, apart: set[nn.Parameter]) -> None:
        """Shard the parameters that are not `apart`; a block without such is left as it is."""
        # a mesh dimension of size one would still cost an all-reduce per unit
        dims = {"shard": shard} if shard == self.world.size else {"replicate": self.world.size // shard, "shard": shard}
        mesh = init_device_mesh(self.world.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
        compute = DTYPES[config.precision]
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pins_memory(self.world.device))
            if config.cpu_offload
            else OffloadPolicy(),
            "reshard_after_forward": config.reshard_after_forward,
        }
        options["ignored_params"] = apart
        for block in blocks_of(self.model):
            if not apart.issuperset(block.parameters()):
                fully_shard(block, **options)
        # the root unit holds the head, the last in forward and the first in backward: keep it unsharded in between
        fully_shard(self.model, **options | {"reshard_after_forward": False})
        # In forward the next block's gather is issued before the present block's kernels, since the host may be slower
        # than they are; in backward FSDP2 does so by itself. The root prefetches nothing: with a feature cache the
        # first block is never reached
        order = [block for block in self.model.forward_order() if isinstance(block, FSDPModule)]
        for unit, following in pairwise(order):
            unit.set_modules_to_forward_prefetch([following])

    @torch.no_grad()
    def _fill(self, weights: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Allocate every shard, and copy its part of the weight of that name."""
        model: nn.Module = self.model
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device=device)  # this empties buffers too, which held values; they are restored below
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):  # what is not sharded is never offloaded
                parameter.data = parameter.data.to(self.world.device)
        self.model.language.tie_weights()  # to_empty breaks weight tying if the parameter is not sharded
        for name, buffer in buffers.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, buffer.to(self.world.device))
        for name, parameter in model.named_parameters():
            local, offset = _local_range(parameter)
            local.copy_(weights[name].flatten()[offset : offset + local.numel()])

    def _unshard_frozen_once(self) -> None:
        """Unshard and reshard once the frozen blocks that no forward may ever reach.

        FSDP2 assumes under gradient accumulation that every unit was unsharded before. (torch 2.14, bf16 compute:
        ``'FSDPParam' object has no attribute '_unsharded_param'``.)
        """
        for block in self.model.blocks()["vision"]:  # blocks above the last used layer; all with a feature cache
            if not any(parameter.requires_grad for parameter in block.parameters()):
                assert isinstance(block, FSDPModule)
                block.unshard()
                block.reshard()

    def step(
        self,
        micro_batches: Sequence[Batch],
        lr_factor: float,
        max_loss: float = math.inf,
        votes: Callable[[], Sequence[float]] = tuple,
    ) -> StepOutput:
        total = accumulate(self.world, micro_batches, self.compiled, self._run)
        if self.masters:
            self.masters.reduce()
        # the norm of undivided gradients: the number of targets on all ranks arrives with the loss, in one reduction.
        # One read of both: the host waits for the device here, and nowhere else in a step
        loss, norm = torch.stack((total, self._grad_norm())).tolist()
        mean, num_tokens, is_fit, voted, divisor = reduce_loss(self.world, loss, micro_batches, max_loss, votes)
        norm = norm / divisor
        # norm and loss are equal on all ranks, so all decide alike without another collective
        taken = is_fit and math.isfinite(norm)
        set_learning_rate(self.optimizer, lr_factor)
        if taken:
            self._scale(divisor, norm)
            self.optimizer.step()
            if self.masters:
                self.masters.copy_back()
        if self.masters:
            self.masters.clear()
        else:
            self.optimizer.zero_grad()
        return StepOutput(mean, norm if math.isfinite(norm) else math.nan, num_tokens, taken, voted)

    def _run(self, batch: Batch, is_last: bool) -> Tensor:
        with self._reducing(is_last):
            self.world.timer.enter("forward")
            loss = self.loss(self._forward, batch)
            self.world.timer.enter("backward")
            torch.autograd.backward(loss if self.masters else loss * self.world.size)  # undoes averaging over ranks
        return loss.detach()

    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        found = evaluate_batches(self.world, self.model, micro_batches, self.loss, self.compiled)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root stays unsharded after a forward, for a backward that does not come here
        return found

    def _reducing(self, wanted: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch: with `wanted`, its backward reduces gradients over ranks; else they accumulate."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(wanted or self.config.sync_each_micro_batch)
            self.model.set_requires_all_reduce(wanted)
            self.model.set_reshard_after_backward(wanted or bool(self.config.reshard_after_backward))
        elif isinstance(self._forward, DistributedDataParallel) and not wanted:
            waiting: AbstractContextManager[None] = self._forward.no_sync()
            return waiting
        return nullcontext()

    def _grad_norm(self) -> Tensor:
        """The norm of this step's gradients on all ranks, a scalar tensor on the device."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return norm.to(self.world.device)  # offloaded gradients are on the host

    def _scale(self, divisor: float, norm: float) -> None:
        """Divide all gradients by `divisor`, and clip them, in one pass. `norm` is their norm after the division."""
        divisor *= max(1.0, (norm + 1e-6) / self.max_grad_norm)
        # for these arguments torch multiplies the gradients by 1 / divisor, as if clipping norm `divisor` to 1
        torch.nn.utils.clip_grads_with_norm_(self._trained(), 1.0, torch.tensor(divisor))

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def fragments(self) -> Iterator[Fragment]:
        self._create_states()
        if self.masters and self.masters.flat:
            for name, place in self.masters.places.items():
                flat = self.masters.updated[place.group]
                for kind, tensor in {"master": flat, **self.kind.kept(self.optimizer.state[flat])}.items():
                    yield Fragment(name, kind, place.shape, 0, tensor.narrow(0, place.start, place.numel))
            return
        trained = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        for name, parameter in (self.masters.updated if self.masters else trained).items():
            for kind, tensor in {"master": parameter, **self.kind.kept(self.optimizer.state[parameter])}.items():
                local, offset = _local_range(tensor.detach())
                if local.numel():
                    yield Fragment(name, kind, tuple(tensor.shape), offset, local)

    def after_load(self, num_steps: int) -> None:
        # FSDP2's compute copies need no update: each forward makes them from the masters
        if self.masters:
            self.masters.copy_back()
        self._create_states()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                set_steps(self.optimizer.state[parameter], group["steps_behind"] + num_steps)

    def _create_states(self) -> None:
        """Create optimizer states now: torch creates them in the first step, but a checkpoint needs them before."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = self.kind.begin(parameter, group)


def _local_range(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's shard of a parameter as a flat view, and its offset in the flattened parameter, in elements."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().view(-1), 0
    local, mesh = tensor.to_local(), tensor.device_mesh
    (dim,) = (i for i, placement in enumerate(tensor.placements) if placement.is_shard())
    rows = math.ceil(tensor.shape[0] / mesh.size(dim))  # rows per rank, fewer on the last ranks, as in torch.chunk
    offset = mesh.get_local_rank(dim) * rows * tensor.shape[1:].numel() if local.numel() else 0
    return local.view(-1), offset
