"""The trainable set is exactly what the globs say, with weight decay as in the paper's optimizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from hive_scale import presets
from hive_scale.config import GroupConfig, StageConfig
from hive_scale.model.build import meta_model
from hive_scale.param_groups import apply_trainable_groups
from hive_scale.registry import FUSION_NAMES


@pytest.mark.parametrize("preset", ["debug", "paper_siglip", "paper_clip"])
@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_stages_train_the_parts_that_the_paper_names(preset: str, fusion: str) -> None:
    run = presets.load(preset, None, [f"fusion={fusion}"])
    model = meta_model(run.model)
    trained = {}
    for name, stage in run.stages.items():
        apply_trainable_groups(model, stage, model.unused_parameters())
        trained[name] = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = {name: {n.split(".")[0] for n in names} for name, names in trained.items()}
    injected = {"fusion"} if fusion.endswith("cross_attention") else set()
    copies = {"fusion"} if fusion == "joint_attention" else set()
    assert parts["projector"] == {"projector"} | injected
    assert parts["language"] == {"projector", "language"} | injected | copies
    assert parts["joint"] == {"projector", "language", "vision"} | injected | copies
    assert trained["projector"] < trained["language"] < trained["joint"]
    # all that is left out at last: what the forward never reads, and (pretrained) embeddings and head
    frozen = {n for n, _ in model.named_parameters()} - trained["joint"] - model.unused_parameters()
    assert frozen == (set() if preset == "debug" else {"language.model.embed_tokens.weight"})


def test_groups_name_each_trained_parameter_once_and_spare_vectors_from_decay() -> None:
    model = meta_model(tiny.model_config())
    stage = StageConfig({"all": GroupConfig(["*"], lr=2e-3, weight_decay=1e-4)})
    groups = apply_trainable_groups(model, stage, model.unused_parameters())
    parameters = dict(model.named_parameters())
    named = [name for group in groups for name in group.parameters]
    assert len(named) == len(set(named))
    assert set(named) == {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert set(named).isdisjoint(model.unused_parameters())
    for group in groups:
        assert (group.lr, group.steps_behind) == (2e-3, 0)
        for name in group.parameters:
            assert (group.weight_decay == 0) == (parameters[name].ndim < 2)


@pytest.mark.parametrize(("decoupled", "kept"), [(True, 1 - 0.01), (False, 1 - 2e-3 * 0.01)])
def test_decay_is_independent_of_the_peak_learning_rate(decoupled: bool, kept: float) -> None:
    """With no gradient a step at the peak takes lambda off (paper, Table 3), or lr * lambda as torch does."""
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    stage = StageConfig({"all": GroupConfig(["*"], lr=2e-3, weight_decay=0.01)}, decoupled_weight_decay=decoupled)
    (group,) = apply_trainable_groups(layer, stage)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=group.lr, weight_decay=group.weight_decay)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * kept)


def test_a_group_that_stands_still_keeps_its_decay() -> None:
    stage = StageConfig({"all": GroupConfig(["*"], lr=0.0, weight_decay=0.01)}, decoupled_weight_decay=True)
    (group,) = apply_trainable_groups(torch.nn.Linear(3, 2, bias=False), stage)
    assert (group.lr, group.weight_decay) == (0.0, 0.01)


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    model = meta_model(tiny.model_config("concat"))
    stage = presets.load("debug", None, []).stages["projector"]  # written for cross_attention
    with pytest.raises(ValueError, match=r"'fusion.\*.weight' matches no parameter: names begin with language.\*"):
        apply_trainable_groups(model, stage)


def test_a_parameter_in_two_groups_is_an_error() -> None:
    model = meta_model(tiny.model_config())
    stage = StageConfig({"a": GroupConfig(["projector.*"], 1e-3), "b": GroupConfig(["*"], 1e-4)})
    with pytest.raises(ValueError, match="groups a and b both name"):
        apply_trainable_groups(model, replace(stage))
