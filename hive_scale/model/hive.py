"""HIVE: figure 4 of the paper as a loop over LLM layers.

Shapes: B samples, T text tokens, V visual tokens, D LLM width, N target tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model import attention
from hive_scale.model.adapters import Adapted
from hive_scale.model.cache import HiveCache
from hive_scale.model.encoders import family_of, hidden_states, patches
from hive_scale.model.fusion import Context, Fusion
from hive_scale.model.hosts import host_of
from hive_scale.registry import FUSIONS


class Hive(nn.Module):
    """A vision encoder and an LLM, joined at several depths.

    `vision` (an encoder of a registered family) and `language` (a causal LM of another) are the Hugging Face modules
    themselves, so parameters are named ``vision.<HF name>`` and ``language.<HF name>``. New parameters are named
    ``projector.<i>.*`` and ``fusion.layers.<i>.*``, where i counts the selected depths from shallow to deep.
    """

    vision: Any
    language: Any
    fusion: Fusion
    pixel_mean: Tensor
    pixel_std: Tensor
    adapted: Adapted | None = None  # what a stage's adapter has wrapped

    def __init__(self, vision: nn.Module, language: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.vision = vision
        self.language = language
        self.language.set_attn_implementation(attention.NAME)  # accepts the visual keys and values of a fusion
        self.family, self.host = family_of(self.vision.config), host_of(language)
        kind: type[Fusion] = FUSIONS[config.fusion]
        paired = kind.encoder_depths(len(self.family.blocks(vision)), config)  # one depth for each fused LLM layer
        paired = paired[::-1] if config.pairing == "deep_to_shallow" else paired
        self.encoder_depths = tuple(sorted(set(paired)))
        self._order = [self.encoder_depths.index(depth) for depth in paired]
        configs = self.vision.config, self.language.config
        self.projector = nn.ModuleList(kind.make_projector(*configs, config) for _ in self.encoder_depths)
        self.fusion = kind(self.host, language, len(paired), config)
        self.num_visual = kind.num_visual(self.family.num_patches(self.vision.config), config)
        self.fusion.check(self.num_visual)
        mean, std = self.family.pixel_mean, self.family.pixel_std
        self.register_buffer("pixel_mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(
        self,
        pixels: Tensor,
        tokens: Tensor,
        target_rows: Tensor,
        target_ids: Tensor,
        has_image: Tensor | None = None,
        image_slots: Tensor | None = None,
    ) -> Tensor:
        """Sum of the token losses (paper eq. 1), a float32 scalar, in nats.

        Args: `pixels` as in `encode_images`; `tokens` (B, T); `target_rows` (N,) indices into the B*T positions that
        predict `target_ids` (N,); `has_image` bool (B,), None if every sample has an image; `image_slots` int (B,),
        the number of text tokens before each image, None if that is 1 everywhere.
        """
        visual = self.encode_images(pixels)
        hidden = self.language_forward(visual, tokens, has_image, image_slots)
        return self.token_loss(hidden.flatten(0, 1)[target_rows], target_ids).sum()

    def encode_images(self, pixels: Tensor) -> list[Tensor]:
        """phi(F_l) for the depth l of each fused LLM layer, (B, V, D) each (paper 3.2).

        `pixels` is uint8 (B, 3, H, W), or cached features (B, S, patches, C) at the S selected
        depths.
        """
        features = pixels.unbind(1) if pixels.is_floating_point() else self.features(self.encode(pixels))
        return self._project(features)

    def encode(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """The encoder's hidden states from the embeddings to the deepest selected depth, from uint8 pixels."""
        return self.encode_normalised(self.normalise(pixels_BCHW))

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 pixels to what the encoder's image processor makes of them, float32 (B, 3, H, W)."""
        return (pixels_BCHW.float() - self.pixel_mean) / self.pixel_std

    def encode_normalised(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Same as `encode`, from pixels that an image processor has normalised already."""
        return hidden_states(self.vision, pixels_BCHW, max(self.encoder_depths))

    def features(self, states: Sequence[Tensor]) -> list[Tensor]:
        """F_l for each selected depth l, (B, patches, C) each, from the encoder's hidden states."""
        return [patches(self.vision, states[depth]) for depth in self.encoder_depths]

    def project(self, states: Sequence[Tensor]) -> list[Tensor]:
        """phi(F_l) for the depth l of each fused LLM layer, (B, V, D) each, from the encoder's hidden states."""
        return self._project(self.features(states))

    def _project(self, features: Sequence[Tensor]) -> list[Tensor]:
        projected = [project(feature) for project, feature in zip(self.projector, features, strict=True)]
        return [projected[index] for index in self._order]  # a depth that serves several layers is projected once

    def language_forward(
        self,
        visual: Sequence[Tensor],
        tokens_BT: Tensor,
        has_image: Tensor | None = None,
        image_slots: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D), before the final norm. Row i predicts the text's token i + 1."""
        text = self.host.embed(self.language, tokens_BT)
        hidden, context = self.fusion.prepare(text, visual, has_image, image_slots)
        return self.fusion.finish(self.run_layers(hidden, context), context)

    def run_layers(self, hidden: Tensor, context: Context, cache: HiveCache | None = None) -> Tensor:
        """The LLM's layers over a stream (B, N, D), of training and generation alike; the shape stays."""
        rotary = self.host.positions(self.language, hidden, context.positions)
        for depth, layer in enumerate(self.host.layers(self.language)):
            hidden, given = self.fusion.before_layer(depth, hidden, context)
            if cache is not None:
                given = cache.for_layer(depth, given, context)
            hidden = layer(hidden, position_embeddings=rotary[depth], **given)
        return hidden

    def attention(
        self, visual: Sequence[Tensor], tokens_BT: Tensor, depths: Sequence[int], has_image: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Attention weights (B, heads, T, V) of each text token on each patch, for the LLM layers in `depths`.

        The fused kernels of `language_forward` return no weights, so those of the given layers are computed separately
        during the same forward. In `cross_attention` a row sums to 1; in the other fusions the text has a share of the
        softmax, too.
        """
        text = self.host.embed(self.language, tokens_BT)
        hidden, context = self.fusion.prepare(text, visual, has_image)
        rotary = self.host.positions(self.language, hidden, context.positions)
        weights = {}
        for depth, layer in enumerate(self.host.layers(self.language)):
            if depth in depths:
                weights[depth] = self.fusion.attention_weights(depth, hidden, context, layer, rotary[depth])
            hidden, given = self.fusion.before_layer(depth, hidden, context)
            hidden = layer(hidden, position_embeddings=rotary[depth], **given)
        return weights

    def visual_layers(self) -> tuple[int, ...]:
        """The LLM layers whose attention to image patches can be shown; () if there are none."""
        return self.fusion.attention_layers(len(self.host.layers(self.language)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: (..., D) to (..., vocabulary)."""
        return self.host.logits(self.language, hidden)

    def token_loss(self, rows_ND: Tensor, target_ids_N: Tensor) -> Tensor:
        """Cross-entropy of each target token, float32 (N,). The head runs on rows with a target only."""
        return F.cross_entropy(self.logits(rows_ND).float(), target_ids_N, reduction="none")

    @property
    def features_shape(self) -> tuple[int, int, int]:
        """(S, patches, C) of one image's features: selected depths, patches, encoder width."""
        return len(self.encoder_depths), self.family.num_patches(self.vision.config), self.vision.config.hidden_size

    def unused_parameters(self) -> set[str]:
        """Names of parameters that the forward never reads: the encoder's head, and blocks above the deepest depth."""
        names = (name for name, _ in self.vision.named_parameters())
        return {f"vision.{name}" for name in names if not self.family.is_read(name, self.encoder_depths)}

    def matrices(self) -> set[str]:
        """Names of the hidden matrices: weights of linear layers but the LLM's head. Embeddings are none."""
        head = self.language.get_output_embeddings()
        layers = ((name, one) for name, one in self.named_modules() if isinstance(one, nn.Linear) and one is not head)
        return {f"{name}.weight" for name, _ in layers}

    def blocks(self) -> dict[str, list[nn.Module]]:
        """The repeated modules of each component: units of sharding, activation checkpointing and compilation.

        Each is only called through its own forward. All other modules, including embeddings and head, form one unit:
        they are small, or shared by weight tying.
        """
        return {
            "vision": list(self.family.blocks(self.vision)),
            "fusion": [*self.projector, *self.fusion.layers],
            "language": list(self.host.layers(self.language)),
        }

    def forward_order(self) -> list[nn.Module]:
        """The blocks that the forward reaches, in its order, so that an engine can prepare each during the one before.

        A registered fusion may call its own in another order, which costs time alone.
        """
        fused = dict(zip(self.fusion.depths, self.fusion.layers, strict=False))  # `concat` has no layers
        order = [*self.family.blocks(self.vision)[: max(self.encoder_depths)], *self.projector]
        for depth, layer in enumerate(self.host.layers(self.language)):
            order += [fused[depth], layer] if depth in fused else [layer]
        return order
