"""Trainable parameters: globs assign parameters to groups, and parameters in no group are frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hive_scale.config import GroupConfig, StageConfig


@dataclass(frozen=True)
class ParamGroup:
    """Names of parameters that share a learning rate and a weight decay."""

    name: str
    parameters: tuple[str, ...]
    lr: float  # peak learning rate
    weight_decay: float  # as in torch.optim.AdamW: it is multiplied by the current learning rate
    steps_behind: int = 0  # optimizer steps of earlier stages that are in the moments
    matrices: bool = False  # True: hidden matrices alone, which an optimizer has set apart (`OptimizerKind.divide`)


def apply_trainable_groups(model: nn.Module, stage: StageConfig, dormant: Collection[str] = ()) -> list[ParamGroup]:
    """Set ``requires_grad`` on every parameter of `model`, and return the stage's parameter groups.

    `dormant` parameters, which the forward never reads or an adapter stands for, stay frozen even if a glob matches
    them. Vectors (norms,
    biases, gates) form a group of their own without weight decay. Call this before the engine wraps the model, on the
    meta device if you like: wrapping replaces the tensors, so the groups hold names.

    Raises ValueError if a glob matches no parameter, a group has dormant ones only, or a parameter falls into two
    groups.
    """
    parameters = dict(model.named_parameters())
    owner: dict[str, str] = {}
    for group_name, group in stage.groups.items():
        for name in _matches(group_name, group, parameters):
            if owner.setdefault(name, group_name) != group_name:
                raise ValueError(f"groups {owner[name]} and {group_name} both name {name}: narrow one of their globs")
    trained = {name: group for name, group in owner.items() if name not in dormant}
    if idle := sorted(stage.groups.keys() - set(trained.values())):
        raise ValueError(
            f"group {idle[0]} would train nothing: the forward reads none of its parameters, or an adapter stands for "
            "them: leave it out, or name others"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    groups = []
    for group_name, group in stage.groups.items():
        names = [name for name in parameters if trained.get(name) == group_name]
        vectors = {name for name in names if parameters[name].ndim < 2}
        groups += [
            ParamGroup(
                group_name, tuple(name for name in names if name not in vectors), group.lr, _decay(stage, group)
            ),
            ParamGroup(f"{group_name}, vectors", tuple(name for name in names if name in vectors), group.lr, 0.0),
        ]
    # torch optimizers refuse empty groups
    return [group for group in groups if group.parameters]


def _matches(group_name: str, group: GroupConfig, names: Iterable[str]) -> list[str]:
    found = []
    for glob in group.parameters:
        matched = [name for name in names if fnmatchcase(name, glob)]
        if not matched:
            roots = sorted({name.split(".")[0] + ".*" for name in names})
            raise ValueError(
                f"group {group_name}: the glob '{glob}' matches no parameter: names begin with {', '.join(roots)}"
            )
        found += matched
    return found


def _decay(stage: StageConfig, group: GroupConfig) -> float:
    """Weight decay for torch, which subtracts lr_t * decay * w from a weight w.

    Fully decoupled decay subtracts (lr_t / lr_max) * lambda * w, so its `decay` is lambda / lr_max.
    """
    if stage.decoupled_weight_decay and group.lr > 0:
        return group.weight_decay / group.lr
    return group.weight_decay
