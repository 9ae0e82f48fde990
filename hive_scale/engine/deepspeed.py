"""ZeRO-1, -2 and -3, with or without offload, by DeepSpeed. Which of them is the JSON's choice."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hive_scale.batch import Batch
from hive_scale.config import EngineConfig, StageConfig
from hive_scale.distributed import Fragment, World
from hive_scale.engine import StateSharding, StepOutput
from hive_scale.engine.accumulation import accumulate, evaluate_batches, reduce_loss
from hive_scale.engine.activation_checkpointing import blocks_of, checkpoint_blocks
from hive_scale.engine.deepspeed_config import load_deepspeed, resolve
from hive_scale.engine.optimizer import make_optimizer, optimizer_kind, set_learning_rate, set_steps, skip_update
from hive_scale.node import use_cores
from hive_scale.param_groups import ParamGroup
from hive_scale.precision import DTYPES


class MasterRange(NamedTuple):
    """The range of one parameter that this rank owns: ``flat[start : start + length]``, from `offset` on."""

    shape: tuple[int, ...]  # of the parameter
    offset: int  # in the flattened parameter
    flat: Tensor  # many parameters' ranges, fp32
    start: int
    length: int


UNTESTED = {"zero_allow_untested_optimizer": True}  # those that an extension registers, too


class DeepSpeedEngine:
    """Parameters are in `config.precision`; masters, moments, gradient sums and reductions in float32."""

    def __init__(
        self,
        model: Any,
        groups: Sequence[ParamGroup],
        stage: StageConfig,
        config: EngineConfig,
        world: World,
        weights: Mapping[str, Tensor],
    ) -> None:
        """Cut `model` (parameters on the meta device, ``requires_grad`` set) as the JSON says, and fill it."""
        settings = resolve(Path(config.ds_config), stage, config, world.size)
        self.model, self.world = model, world
        zero_stage = settings["zero_optimization"]["stage"]
        self.partitions_parameters = zero_stage == 3
        # DeepSpeed asks the environment, also where no launcher has set it
        os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
        if world.device.type == "cpu":
            os.environ.setdefault("LOCAL_SIZE", str(world.size))  # or it starts numactl to count, in every step
        load_deepspeed().init_distributed(auto_mpi_discovery=False)  # adopts the group that exists
        compute = DTYPES[config.precision]
        self.divides = zero_stage > 1 or compute == torch.float32  # its bf16 optimizer of ZeRO-1 heeds no loss scale
        cut = [world.size if zero_stage >= least else 1 for least in (3, 2, 1)]  # parameters, gradients, optimizer
        self.kind = optimizer_kind(stage)
        self.layout = StateSharding(compute.itemsize, cut[0], 4, cut[1], 4 + 4 * len(self.kind.states), cut[2])
        checkpoint_blocks(model.blocks(), config.checkpointing, gathers_within=self.partitions_parameters)
        self._fill(weights, compute, settings)
        if config.compile:
            for block in blocks_of(model):
                block.compile()
        self.optimizer = make_optimizer(dict(model.named_parameters()), groups, stage)
        self.engine, *_ = load_deepspeed().initialize(
            model=model, optimizer=self.optimizer, config=UNTESTED | settings, dist_init_required=False
        )
        weakref.finalize(self, _free_engine, self.engine, self.optimizer).atexit = False
        if compute != torch.float32:
            self._restore_masters(weights)
        if (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none":
            use_cores(world)

    @torch.no_grad()
    def _fill(self, weights: Mapping[str, Tensor], compute: torch.dtype, settings: dict[str, Any]) -> None:
        """Give every parameter memory and its tensor; ZeRO-3 cuts each block up before the next is made."""
        deepspeed, model, device = load_deepspeed(), self.model, self.world.device
        names = {parameter: name for name, parameter in model.named_parameters()}
        for unit in (*blocks_of(model), model):
            for parameter in unit.parameters():
                if parameter.is_meta:
                    real = weights[names[parameter]].to(device, compute, copy=True)
                    # swapped, not set: the same object stays in every module that shares it
                    torch.utils.swap_tensors(parameter, nn.Parameter(real, parameter.requires_grad))  # type: ignore[no-untyped-call]
            if self.partitions_parameters:
                deepspeed.zero.Init(module=unit, config_dict_or_path=settings, dtype=compute)

    @torch.no_grad()
    def _restore_masters(self, weights: Mapping[str, Tensor]) -> None:
        """DeepSpeed makes its masters of the rounded copies; give back the digits that these have lost."""
        for fragment in self.fragments():
            if fragment.kind == "master":
                end = fragment.offset + fragment.data.numel()
                fragment.data.copy_(weights[fragment.name].flatten()[fragment.offset : end])

    def step(
        self,
        micro_batches: Sequence[Batch],
        lr_factor: float,
        max_loss: float = math.inf,
        votes: Callable[[], Sequence[float]] = tuple,
    ) -> StepOutput:
        share = float(self.world.size)  # since DeepSpeed averages over ranks
        if not self.divides:
            share /= max(1.0, *self.world.sum(sum(batch.num_tokens for batch in micro_batches)))
        total = accumulate(self.world, micro_batches, partial(self._run, share))
        mean, num_tokens, is_fit, voted, divisor = reduce_loss(self.world, total, micro_batches, max_loss, votes)
        set_learning_rate(self.optimizer, lr_factor)
        if self.divides:
            self.engine.optimizer.loss_scale = divisor  # by which it divides gradients, though no loss was multiplied
        with nullcontext() if is_fit else skip_update(self.optimizer):
            self.engine.step()  # which tidies up after backward, too
        self.engine.optimizer.loss_scale = 1.0
        norm = self._grad_norm()
        return StepOutput(mean, norm, num_tokens, is_fit and math.isfinite(norm), voted)

    def _run(self, share: float, batch: Batch, is_last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.world.timer.enter("forward")
        loss = self._loss(batch)
        self.world.timer.enter("backward")
        self.engine.backward(loss * share, scale_wrt_gas=False)
        return loss.detach()

    def _grad_norm(self) -> float:
        # a step whose gradient is not finite is left out, and then the norm is an older one
        return math.nan if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        return evaluate_batches(self.world, self.engine, micro_batches, self._loss)

    def _loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self.engine(**batch.to(self.world.device).inputs())
        return loss

    def fragments(self) -> Iterator[Fragment]:
        self._create_states()
        for name, _, owned in self._owned():
            state = self.engine.optimizer.state[owned.flat]
            for kind, tensor in (("master", owned.flat.detach()), *((key, state[key]) for key in self.kind.states)):
                yield Fragment(name, kind, owned.shape, owned.offset, tensor.narrow(0, owned.start, owned.length))

    @torch.no_grad()
    def after_load(self, num_steps: int) -> None:
        self._create_states()
        for flat, steps_behind in zip(self._masters(), self._prior_steps(), strict=True):
            set_steps(self.engine.optimizer.state[flat], steps_behind + num_steps)
        if not self.partitions_parameters:
            self.engine.optimizer.update_lp_params()
            return
        self.engine.optimizer.checkpoint_event_prologue()  # partitions what is kept gathered
        for _, parameter, owned in self._owned():
            parameter.ds_tensor[: owned.length].copy_(owned.flat[owned.start : owned.start + owned.length])
        self.engine.optimizer.checkpoint_event_epilogue()  # and gathers it again

    def _owned(self) -> Iterator[tuple[str, Any, MasterRange]]:
        """Every trained parameter of which this rank owns something, and what that is."""
        of = self._owned_under_3 if self.partitions_parameters else self._owned_under_1_and_2
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and (owned := of(parameter)):
                yield name, parameter, owned

    def _owned_under_1_and_2(self, parameter: Any) -> MasterRange | None:
        cut = parameter._hp_mapping  # where its low-precision copy lies in a master: None for nothing
        if cut is None:
            return None
        flat = self._masters()[cut.param_group_index]
        held, here = cut.lp_fragment_address, cut.hp_fragment_address
        return MasterRange(tuple(parameter.shape), held.start, flat, here.start, here.numel)

    def _owned_under_3(self, parameter: Any) -> MasterRange | None:
        """Rank r holds numbers [r n, (r + 1) n) of a parameter padded to a multiple of n."""
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
        """The flat fp32 tensors that the optimizer steps."""
        optimizer = self.engine.optimizer
        if self.partitions_parameters:  # whose groups are empty between steps
            return optimizer.fp32_partitioned_groups_flat  # type: ignore[no-any-return]
        return [group["params"][0] for group in optimizer.param_groups]

    def _prior_steps(self) -> Sequence[int]:
        """Of each of `_masters`: steps of earlier stages that its moments hold."""
        optimizer, groups = self.engine.optimizer, self.optimizer.param_groups
        if self.partitions_parameters:  # which cuts large groups into several
            numbers = [optimizer.sub_group_to_group_id[i] for i in range(len(optimizer.fp32_partitioned_groups_flat))]
            return [groups[number]["steps_behind"] for number in numbers]
        return [group["steps_behind"] for group in groups]

    def _create_states(self) -> None:
        """An optimizer makes its state in the first step; a checkpoint before that, or a load, needs it now."""
        for flat, steps_behind in zip(self._masters(), self._prior_steps(), strict=True):
            if not self.engine.optimizer.state[flat]:
                self.engine.optimizer.state[flat] = self.kind.first_state(flat, steps_behind)


def _free_engine(engine: Any, optimizer: Any) -> None:
    """Free what a past engine held. DeepSpeed never would: its hooks and tables keep engine and model for good."""
    engine.destroy()
    parameters = list(engine.module.parameters())
    for holder in (optimizer, engine.optimizer, *parameters):
        vars(holder).clear()
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
