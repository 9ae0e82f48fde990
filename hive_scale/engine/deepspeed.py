"""The DeepSpeed engine: ZeRO-1, -2 or -3, with or without offload, as a DeepSpeed JSON says."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hive_scale.batch import Batch
from hive_scale.config import EngineConfig, StageConfig
from hive_scale.distributed import EMA, Fragment, World
from hive_scale.engine import Loss, StateSharding, StepOutput, token_loss
from hive_scale.engine.accumulation import accumulate, evaluate_batches, reduce_loss
from hive_scale.engine.activation_checkpointing import blocks_of, checkpoint_blocks
from hive_scale.engine.compilation import compile_blocks, is_compiled
from hive_scale.engine.deepspeed_config import load_deepspeed, resolve
from hive_scale.engine.optimizer import (
    make_optimizer,
    numels,
    optimizer_kind,
    set_learning_rate,
    set_steps,
    skip_update,
)
from hive_scale.node import use_cores
from hive_scale.param_groups import ParamGroup
from hive_scale.precision import DTYPES


class MasterRange(NamedTuple):
    """The range of a parameter that this rank owns: ``flat[start : start + length]``, at `offset` in it."""

    shape: tuple[int, ...]  # shape of the parameter
    offset: int  # start of the range in the flattened parameter, in elements
    flat: Tensor  # 1-D fp32 master tensor that holds ranges of many parameters
    start: int
    length: int


UNTESTED = {"zero_allow_untested_optimizer": True}  # lets DeepSpeed accept optimizers of extensions


class DeepSpeedEngine:
    """Parameters are in `config.precision`; masters, moments, gradient sums and, by default, reductions in float32."""

    # the ranks that share the second copy of the weights (zero_hpz_partition_size): DeepSpeed makes this group once in
    # a process, and must be given it from then on
    second_group: ClassVar[Any] = None

    def __init__(
        self,
        model: Any,
        groups: Sequence[ParamGroup],
        stage: StageConfig,
        config: EngineConfig,
        world: World,
        weights: Mapping[str, Tensor],
    ) -> None:
        """Shard `model` as the JSON says, and fill it. Its parameters are on the meta device, ``requires_grad`` set."""
        settings = resolve(Path(config.ds_config), stage, config, world.size)
        self.model, self.world = model, world
        self.loss: Loss = token_loss
        zero_stage = settings["zero_optimization"]["stage"]
        self.partitions_parameters = zero_stage == 3
        # DeepSpeed reads LOCAL_RANK, which not every launcher sets
        os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
        if world.device.type == "cpu":
            os.environ.setdefault("LOCAL_SIZE", str(world.size))  # else DeepSpeed runs numactl in every step to count
        load_deepspeed().init_distributed(auto_mpi_discovery=False)  # adopts the existing process group
        compute = DTYPES[config.precision]
        self.divides = zero_stage > 1 or compute == torch.float32  # ZeRO-1's bf16 optimizer ignores the loss scale
        cut = [world.size if zero_stage >= least else 1 for least in (3, 2, 1)]  # of parameters, gradients, optimizer
        self.kind = optimizer_kind(stage)
        parameters = compute.itemsize, cut[0]
        kept = self.kind.kept_shapes(groups, {name: tuple(one.shape) for name, one in model.named_parameters()})
        self.layout = StateSharding(*parameters, *parameters, 4, cut[1], 4, cut[2], numels(kept))
        checkpoint_blocks(model.blocks(), config.checkpointing, gathers_within=self.partitions_parameters)
        self._fill(weights, compute, settings)
        self.compiled = is_compiled(config, world.device.type)
        if self.compiled:
            compile_blocks(model)
        self.optimizer = make_optimizer(dict(model.named_parameters()), groups, stage)
        self.engine, *_ = load_deepspeed().initialize(
            model=model, optimizer=self.optimizer, config=UNTESTED | settings, dist_init_required=False
        )
        weakref.finalize(self, _free_engine, self.engine, self.optimizer).atexit = False
        if compute != torch.float32:
            self._restore_masters(weights)
        if self.kind.ema:
            self._create_states()  # the average begins with the weights before the first step
        if (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none":
            use_cores(world)

    @torch.no_grad()
    def _fill(self, weights: Mapping[str, Tensor], compute: torch.dtype, settings: dict[str, Any]) -> None:
        """Allocate and fill every parameter. ZeRO-3 shards each block before the next one is allocated."""
        deepspeed, model, device = load_deepspeed(), self.model, self.world.device
        names = {parameter: name for name, parameter in model.named_parameters()}
        has_second = settings["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        for unit in (*blocks_of(model), model):
            for parameter in unit.parameters():
                if parameter.is_meta:
                    real = weights[names[parameter]].to(device, compute, copy=True)
                    # swapped in place, so that modules that share the parameter keep sharing it
                    torch.utils.swap_tensors(parameter, nn.Parameter(real, parameter.requires_grad))  # type: ignore[no-untyped-call]
            if self.partitions_parameters:
                group = DeepSpeedEngine.second_group if has_second else None
                deepspeed.zero.Init(
                    module=unit, config_dict_or_path=settings, dtype=compute, zero_param_parallel_group=group
                )
                if has_second:
                    made: Any = next(unit.parameters())
                    DeepSpeedEngine.second_group = made.ds_zero_param_process_group

    @torch.no_grad()
    def _restore_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Copy full-precision weights into the masters, since DeepSpeed made these from the rounded bf16 copies."""
        for fragment in self.fragments():
            if fragment.kind in ("master", EMA):
                end = fragment.offset + fragment.data.numel()
                fragment.data.copy_(weights[fragment.name].flatten()[fragment.offset : end])

    def step(
        self,
        micro_batches: Sequence[Batch],
        lr_factor: float,
        max_loss: float = math.inf,
        votes: Callable[[], Sequence[float]] = tuple,
    ) -> StepOutput:
        share = float(self.world.size)  # undoes DeepSpeed's averaging over ranks
        if not self.divides:
            share /= max(1.0, *self.world.sum(sum(batch.num_tokens for batch in micro_batches)))
        total = accumulate(self.world, micro_batches, self.compiled, partial(self._run, share))
        mean, num_tokens, is_fit, voted, divisor = reduce_loss(self.world, total.item(), micro_batches, max_loss, votes)
        set_learning_rate(self.optimizer, lr_factor)
        if self.divides:
            self.engine.optimizer.loss_scale = divisor  # divides the gradients; no loss was multiplied by it
        with nullcontext() if is_fit else skip_update(self.optimizer):
            self.engine.step()  # called also for a skipped step, since it clears the gradients
        self.engine.optimizer.loss_scale = 1.0
        norm = self._grad_norm()
        return StepOutput(mean, norm, num_tokens, is_fit and math.isfinite(norm), voted)

    def _run(self, share: float, batch: Batch, is_last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.world.timer.enter("forward")
        loss = self.loss(self.engine, batch)
        self.world.timer.enter("backward")
        self.engine.backward(loss * share, scale_wrt_gas=False)
        return loss.detach()

    def _grad_norm(self) -> float:
        # after an overflow DeepSpeed skips the step, and its norm is that of an earlier step
        return math.nan if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        return evaluate_batches(self.world, self.engine, micro_batches, self.loss, self.compiled)

    def fragments(self) -> Iterator[Fragment]:
        self._create_states()
        for name, _, owned in self._owned():
            state = self.kind.kept(self.engine.optimizer.state[owned.flat])
            for kind, tensor in {"master": owned.flat.detach(), **state}.items():
                yield Fragment(name, kind, owned.shape, owned.offset, tensor.narrow(0, owned.start, owned.length))

    @torch.no_grad()
    def after_load(self, num_steps: int) -> None:
        self._create_states()
        for flat, group in zip(self._masters(), self._groups(), strict=True):
            set_steps(self.engine.optimizer.state[flat], group["steps_behind"] + num_steps)
        if not self.partitions_parameters:
            self.engine.optimizer.update_lp_params()
            return
        self.engine.optimizer.checkpoint_event_prologue()  # shards persistent parameters, which are kept gathered
        for _, parameter, owned in self._owned():
            parameter.ds_tensor[: owned.length].copy_(owned.flat[owned.start : owned.start + owned.length])
        self.engine.optimizer.checkpoint_event_epilogue()  # gathers them again

    def _owned(self) -> Iterator[tuple[str, Any, MasterRange]]:
        """Yield (name, parameter, range) for each trained parameter of which this rank owns a range."""
        of = self._owned_under_3 if self.partitions_parameters else self._owned_under_1_and_2
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and (owned := of(parameter)):
                yield name, parameter, owned

    def _owned_under_1_and_2(self, parameter: Any) -> MasterRange | None:
        cut = parameter._hp_mapping  # DeepSpeed's map from the low-precision copy to the master; None: not owned here
        if cut is None:
            return None
        flat = self._masters()[cut.param_group_index]
        held, here = cut.lp_fragment_address, cut.hp_fragment_address
        return MasterRange(tuple(parameter.shape), held.start, flat, here.start, here.numel)

    def _owned_under_3(self, parameter: Any) -> MasterRange | None:
        """Rank r owns elements [r n, (r + 1) n) of a parameter that is padded to world_size * n elements."""
        optimizer = self.engine.optimizer
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = size * self.world.rank
        length = min(size, parameter.ds_numel - offset)
        return (
            MasterRange(tuple(parameter.ds_shape), offset, self._masters()[group], start, length)
            if length > 0
            else None
        )

    def _masters(self) -> Sequence[Tensor]:
        """The flat fp32 tensors that the optimizer updates."""
        optimizer = self.engine.optimizer
        if self.partitions_parameters:  # ZeRO-3 leaves the optimizer's groups empty between steps
            return optimizer.fp32_partitioned_groups_flat  # type: ignore[no-any-return]
        return [group["params"][0] for group in optimizer.param_groups]

    def _groups(self) -> Sequence[Mapping[str, Any]]:
        """The optimizer's group of each of `_masters`."""
        optimizer, groups = self.engine.optimizer, self.optimizer.param_groups
        if self.partitions_parameters:  # ZeRO-3 splits large groups into sub-groups
            numbers = [optimizer.sub_group_to_group_id[i] for i in range(len(optimizer.fp32_partitioned_groups_flat))]
            return [groups[number] for number in numbers]
        return groups

    def _create_states(self) -> None:
        """Create optimizer states now: torch creates them in the first step, but a checkpoint needs them before."""
        for flat, group in zip(self._masters(), self._groups(), strict=True):
            if not self.engine.optimizer.state[flat]:
                self.engine.optimizer.state[flat] = self.kind.begin(flat, group)


def _free_engine(engine: Any, optimizer: Any) -> None:
    """Free all that a finished engine holds. DeepSpeed's hooks and global tables would keep engine and model alive."""
    engine.destroy()
    parameters = list(engine.module.parameters())
    for holder in (optimizer, engine.optimizer, *parameters):
        vars(holder).clear()
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
