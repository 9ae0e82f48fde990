"""Contenders that step in the caller's thread: hive_scale, a bare loop, Accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.task import ACCUMULATION, CLIP, Step, Task

if TYPE_CHECKING:
    from hive_scale.batch import Batch


def ours(task: Task) -> Step:
    from hive_scale.engine import open_engine
    from hive_scale.model.build import meta_model
    from hive_scale.param_groups import apply_trainable_groups

    weights = dict(task.build()[0].named_parameters())
    model = meta_model(task.config)
    groups = apply_trainable_groups(model, task.stage, model.unused_parameters())
    engine = open_engine(model, groups, task.stage, task.engine, task.world, weights)

    def step(batches: Sequence[Batch]) -> float:
        output = engine.step(batches, 1.0)
        assert output.grad_norm > CLIP, "clipping must be at work"
        return output.loss

    return step


def bare(task: Task) -> Step:
    """A loop as one would write it by hand: plain PyTorch, or DeepSpeed's own engine."""
    from contextlib import nullcontext

    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from hive_scale.engine.optimizer import make_optimizer

    if task.engine.ds_config:
        return bare_deepspeed(task)
    model, groups = task.build()
    world, sharded = task.world, is_fsdp(task)
    if sharded:
        for block in (block for blocks in model.blocks().values() for block in blocks):
            fully_shard(block)
        fully_shard(model)
    elif world.size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = make_optimizer(dict(getattr(model, "module", model).named_parameters()), groups, task.stage)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(batches: Sequence[Batch]) -> float:
        (num_tokens,) = world.sum(sum(batch.num_tokens for batch in batches))
        total = torch.zeros((), device=world.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            if sharded:
                model.set_requires_gradient_sync(last)
            with nullcontext() if last or sharded or world.size == 1 else model.no_sync():
                loss = model(**batch.to(world.device).inputs())
                (loss * (world.size / num_tokens)).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return world.sum(total.item())[0] / num_tokens

    return step


def bare_deepspeed(task: Task) -> Step:
    import torch

    from hive_scale.engine.deepspeed_config import load_deepspeed
    from hive_scale.engine.optimizer import make_optimizer

    model, groups = task.build()
    optimizer, world = make_optimizer(dict(model.named_parameters()), groups, task.stage), task.world
    engine, *_ = load_deepspeed().initialize(model=model, optimizer=optimizer, config=deepspeed_settings(task))

    def step(batches: Sequence[Batch]) -> float:
        (num_tokens,) = world.sum(sum(batch.num_tokens for batch in batches))
        total = torch.zeros((), device=world.device)
        for batch in batches:
            loss = engine(**batch.to(world.device).inputs())
            engine.backward(loss * (world.size * ACCUMULATION / num_tokens))  # DeepSpeed divides by the accumulation
            engine.step()
            total += loss.detach()
        return world.sum(total.item())[0] / num_tokens

    return step


def is_fsdp(task: Task) -> bool:
    return task.world.size > 1 and task.engine.shard_size == 0 and not task.engine.ds_config


def deepspeed_settings(task: Task) -> dict[str, Any]:
    from hive_scale.engine.deepspeed_config import resolve

    return resolve(Path(task.engine.ds_config), task.stage, task.engine, task.world.size)


def open_accelerator(task: Task, model: Any) -> Any:
    """Return an Accelerator for the task's sharding. Its state is global to the process, so Trainer uses it as well."""
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState(cpu=task.world.device.type == "cpu")  # must be told that the ranks run on CPUs
    if task.engine.ds_config:
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_settings(task)))
    if not is_fsdp(task):
        return Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    blocks = {type(block).__name__ for part in model.blocks().values() for block in part}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(blocks),
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    if task.world.device.type == "cpu":
        # Accelerate offers FSDP only on accelerators, though its loop does not need one
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator


def accelerate(task: Task) -> Step:
    """The loop of Accelerate's guide to accumulation, with the loss scaled by tokens instead of a mean of means."""
    from contextlib import nullcontext

    import torch

    from hive_scale.engine.optimizer import make_optimizer

    model, groups = task.build()
    accelerator = open_accelerator(task, model)
    model, optimizer = accelerator.prepare(model, make_optimizer(dict(model.named_parameters()), groups, task.stage))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    world, extra = task.world, {"scale_wrt_gas": False} if task.engine.ds_config else {}

    def step(batches: Sequence[Batch]) -> float:
        count = torch.tensor(sum(batch.num_tokens for batch in batches), device=world.device)
        num_tokens = int(accelerator.reduce(count, "sum"))
        total = torch.zeros((), device=world.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            # Trainer counts micro-batches itself and has set the shared state to 1 per step; set it likewise
            accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else accelerator.no_sync(model):
                loss = model(**batch.to(world.device).inputs())
                accelerator.backward(loss * (world.size / num_tokens), **extra)
            total += loss.detach()
        accelerator.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(accelerator.reduce(total, "sum")) / num_tokens

    return step
