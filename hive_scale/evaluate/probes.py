"""Probes: classifiers on a frozen encoder, trained for a whole grid of learning rates at once (paper, Table 4).

Shapes: B images, V visual tokens, C encoder width, H attention heads of h channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hive_scale.distributed import World
from hive_scale.phase_timer import tick
from hive_scale.schedule import lr_factor

Kind = Literal["attentive", "linear"]
RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)  # learning rates of AIMv2, whose appendix the paper's follows
HEAD_DIM = 64


@dataclass(frozen=True)
class Recipe:
    """Training recipe of a probe. The paper gives all values except rates and epochs; 50 epochs make its warm-up 3 %.

    Small sets give few batches in that many epochs, and the score of a probe that has not converged measures its
    progress instead of the features. Each batch is therefore repeated until training has `min_steps` steps.
    """

    rates: tuple[float, ...] = RATES
    epochs: int = 50
    min_steps: int = 2000
    batch: int = 512
    weight_decay: float = 0.01
    max_grad_norm: float = 3.0
    warmup_epochs: float = 1.5
    min_lr: float = 1e-5


def normalised(features_BVC: Tensor) -> Tensor:
    """LayerNorm without gain and bias; each probe has its own."""
    return F.layer_norm(features_BVC, features_BVC.shape[-1:], eps=1e-6)


class LinearProbe(nn.Module):
    """Mean over the tokens of LayerNormed features, then a linear classifier."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.classify = nn.Linear(width, num_classes)

    def forward(self, normal_BVC: Tensor) -> Tensor:
        """Class scores (B, classes) of normalised features (B, V, C): mean over tokens, then one linear layer."""
        scores: Tensor = self.classify(normal_BVC.mean(1) * self.gain + self.bias)
        return scores


class AttentiveProbe(nn.Module):
    """LayerNorm, ``nn.MultiheadAttention`` with one learned query over the tokens, linear classifier.

    With a single query, keys and values need not be materialised: the query is mapped back through the key projection,
    and values are projected after pooling. This costs 2 V C H instead of 2 V C^2 per image, for the same result.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.attention = nn.MultiheadAttention(width, max(1, width // HEAD_DIM), batch_first=True)
        self.classify = nn.Linear(width, num_classes)

    def forward(self, normal_BVC: Tensor) -> Tensor:
        """Class scores (B, classes) of normalised features (B, V, C): one learned query attends to the tokens."""
        heads, width = self.attention.num_heads, normal_BVC.shape[2]
        q_weight, k_weight, v_weight = self.attention.in_proj_weight.chunk(3)
        q_bias, _, v_bias = self.attention.in_proj_bias.chunk(3)
        query_Hh = (q_weight @ self.query + q_bias).view(heads, -1)
        # biases add the same value to every token's score, which the softmax cancels
        back_HC = torch.einsum("Hh,HhC->HC", query_Hh, k_weight.reshape(heads, -1, width)) * self.gain
        scores_BHV = (normal_BVC @ back_HC.T).transpose(1, 2) * query_Hh.shape[1] ** -0.5
        pooled_BHC = scores_BHV.softmax(-1) @ normal_BVC * self.gain + self.bias
        values_BHh = torch.einsum("BHC,HhC->BHh", pooled_BHC, v_weight.reshape(heads, -1, width))
        mixed: Tensor = self.attention.out_proj(values_BHh.flatten(1) + v_bias)
        classes: Tensor = self.classify(mixed)
        return classes


PROBES: dict[Kind, type[LinearProbe] | type[AttentiveProbe]] = {"attentive": AttentiveProbe, "linear": LinearProbe}


class ProbeGrid:
    """One probe per kind and learning rate. All train on the same features, each as if it were alone."""

    def __init__(
        self, kinds: Sequence[Kind], width: int, num_classes: int, recipe: Recipe, seed: int, world: World
    ) -> None:
        self.recipe, self.world = recipe, world
        self.keys = [(kind, rate) for kind in kinds for rate in recipe.rates]
        with torch.random.fork_rng(devices=[]):
            self.probes = []
            for kind, _ in self.keys:
                torch.manual_seed(seed)  # every rate starts from the same weights
                self.probes.append(PROBES[kind](width, num_classes).to(world.device))
        groups = [{"params": list(probe.parameters())} for probe in self.probes]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=recipe.weight_decay, foreach=True)

    def step(self, features_BVC: Tensor, labels_B: Tensor, count: int, step: int, num_steps: int) -> None:
        """Take optimizer step number `step` of every probe, on this rank's part of a global batch of `count` images."""
        normal = normalised(features_BVC)
        losses = [F.cross_entropy(probe(normal), labels_B, reduction="sum") for probe in self.probes]
        self.optimizer.zero_grad()
        (torch.stack(losses).sum() / count).backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for probe in self.probes for parameter in probe.parameters()]
        self.world.add_up([gradient for gradient in gradients if gradient is not None])
        warmup = min(1.0, self.recipe.warmup_epochs / self.recipe.epochs)
        for probe, group, (_, rate) in zip(self.probes, self.optimizer.param_groups, self.keys, strict=True):
            nn.utils.clip_grad_norm_(probe.parameters(), self.recipe.max_grad_norm)
            group["lr"] = rate * lr_factor(step, num_steps, warmup, min(1.0, self.recipe.min_lr / rate))
        self.optimizer.step()

    @torch.no_grad()
    def right(self, features_BVC: Tensor, labels_B: Tensor) -> Tensor:
        """Number of images that each probe classifies correctly, int64 (number of probes,).

        Non-finite scores of a diverged probe choose no class; `argmax` would choose the first.
        """
        normal = normalised(features_BVC)
        scores = torch.stack([probe(normal) for probe in self.probes])
        return ((scores.argmax(-1) == labels_B) & scores.isfinite().all(-1)).sum(-1)


def nearest_neighbours(
    known_NC: Tensor, labels_N: Tensor, asked_MC: Tensor, num_classes: int, neighbours: int = 20
) -> Tensor:
    """Classes (M,) by a vote of the nearest neighbours by cosine similarity, weighted by exp(similarity / 0.07)."""
    known, asked = F.normalize(known_NC.float(), dim=1), F.normalize(asked_MC.float(), dim=1)
    voted = []
    for part in torch.split(asked, 1024):
        similarity, which = (part @ known.T).topk(min(neighbours, len(known)), dim=1)
        tick()
        votes = torch.zeros(len(part), num_classes, device=part.device)
        voted.append(votes.scatter_add_(1, labels_N[which], (similarity / 0.07).exp()).argmax(1))
    return torch.cat(voted)
