"""Savers of one stage's state: hive_scale, DeepSpeed, torch.distributed.checkpoint, Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers import open_accelerator
from benchmarks.task import Task

if TYPE_CHECKING:  # imported late at run time, so that --help answers at once
    from torch import Tensor


@dataclass(frozen=True)
class Saver:
    """`save` returns when training may continue, `finish` when the write is complete; `load` restores `state`."""

    path: Path
    state: Callable[[], Iterator[Tensor]]  # yields this rank's master weights and moments
    save: Callable[[], object]
    finish: Callable[[], object]
    load: Callable[[], object]


def compete(task: Task, folder: Path) -> dict[str, Saver]:
    """Return savers of one engine's random state; Accelerate's saves a model of its own."""
    import torch

    from hive_scale.engine import open_engine
    from hive_scale.model.build import meta_model
    from hive_scale.param_groups import apply_trainable_groups

    model = meta_model(task.config)
    groups = apply_trainable_groups(model, task.stage, model.unused_parameters())
    weights = dict(task.model.named_parameters())
    engine: Any = open_engine(model, groups, task.stage, task.engine, task.world, weights)
    torch.manual_seed(task.world.rank)
    for fragment in engine.fragments():
        fragment.data.normal_()
    engine.after_load(1)
    savers = {"ours": ours(task, engine, folder / "ours")}
    if task.engine.ds_config:
        return savers | {"DeepSpeed save_checkpoint": deepspeed(engine, folder / "deepspeed")}
    return savers | {
        "dcp.save": checkpointed(engine, folder / "dcp", asynchronous=False),
        "dcp.async_save": checkpointed(engine, folder / "dcp_async", asynchronous=True),
        "Accelerate save_state": accelerate(task, folder / "accelerate"),
    }


def state_of(engine: Any) -> Iterator[Tensor]:
    return (fragment.data for fragment in engine.fragments())


def ours(task: Task, engine: Any, path: Path) -> Saver:
    from hive_scale.checkpoint.checkpointer import Checkpointer
    from hive_scale.config import KeepConfig

    store, steps = Checkpointer(path, task.world, KeepConfig(1)), count(1)

    def load() -> None:
        fresh = Checkpointer(path, task.world)  # a new object, which verifies everything
        newest = fresh.latest()
        assert newest is not None
        engine.after_load(fresh.load(newest, engine.fragments())["step"])

    def save() -> None:
        step = next(steps)
        store.save(step, engine.fragments(), {"step": step})

    return Saver(path, lambda: state_of(engine), save, store.finish, load)


def deepspeed(engine: Any, path: Path) -> Saver:
    def save() -> None:
        engine.engine.save_checkpoint(str(path), tag="t", exclude_frozen_parameters=True)

    def load() -> None:
        found, _ = engine.engine.load_checkpoint(str(path), tag="t", load_module_strict=False)
        if found is None:
            raise FileNotFoundError(path)

    return Saver(path, lambda: state_of(engine), save, lambda: None, load)


def checkpointed(engine: Any, path: Path, asynchronous: bool) -> Saver:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    group: Any = dist.new_group(backend="gloo")
    options = StateDictOptions(ignore_frozen_params=True)
    pending: list[Any] = []

    def held() -> dict[str, Any]:
        model, optimizer = get_state_dict(engine.model, engine.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def save() -> None:
        if asynchronous:
            pending.append(dcp.async_save(held(), checkpoint_id=path, process_group=group))
        else:
            dcp.save(held(), checkpoint_id=path, process_group=group)

    def load() -> None:
        into = held()
        dcp.load(into, checkpoint_id=path, process_group=group)
        set_state_dict(
            engine.model,
            engine.optimizer,
            model_state_dict=into["model"],
            optim_state_dict=into["optimizer"],
            options=replace(options, strict=False),
        )

    return Saver(path, lambda: state_of(engine), save, lambda: [pending.pop().result() for _ in list(pending)], load)


def accelerate(task: Task, path: Path) -> Saver:
    """An FSDP2 copy of the model, prepared by Accelerate; one step has created its moments."""
    import torch

    from hive_scale.engine.optimizer import AdamW, make_optimizer

    model, groups = task.build()
    accelerator = open_accelerator(task, model)
    model, optimizer = accelerator.prepare(model, make_optimizer(dict(model.named_parameters()), groups, task.stage))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def state() -> Iterator[Tensor]:
        moments = [optimizer.optimizer.state[parameter][moment] for parameter in trained for moment in AdamW.states]
        return (tensor.detach().to_local() for tensor in (*trained, *moments))

    return Saver(
        path, state, lambda: accelerator.save_state(str(path)), lambda: None, lambda: accelerator.load_state(str(path))
    )
