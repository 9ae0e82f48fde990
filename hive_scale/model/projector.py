"""Projectors phi (paper 3.2) from encoder width C to LLM width D, one per selected depth."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """y = W_2 gelu(W_1 x): LLaVA's connector, used by the concat baseline."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.up = nn.Linear(width_in, width_out)
        self.activation = nn.GELU()
        self.down = nn.Linear(width_out, width_out)

    def forward(self, features_BVC: Tensor) -> Tensor:
        """(B, V, C) to (B, V, D)."""
        projected: Tensor = self.down(self.activation(self.up(features_BVC)))
        return projected.clone()  # FSDP2 warns about views as a unit's output, and a linear layer may return one


class Projector(MLP):
    """y = W_s LN(x) + W_2 gelu(W_1 LN(x)): 2-layer MLP with a residual; W_s is the identity if the widths are equal."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        self.norm = nn.LayerNorm(width_in)
        same = width_in == width_out
        self.shortcut: nn.Module = nn.Identity() if same else nn.Linear(width_in, width_out, bias=False)

    def forward(self, features_BVC: Tensor) -> Tensor:
        """(B, V, C) to (B, V, D)."""
        normed = self.norm(features_BVC)
        projected: Tensor = self.shortcut(normed) + self.down(self.activation(self.up(normed)))
        return projected
