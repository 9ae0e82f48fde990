"""HIVE as a model of transformers: `from_pretrained`, `generate`, pipelines.

Importing this module registers it, so that transformers' Auto classes and pipelines open a directory that `export.py
hive` has written. `Hive` computes; what is here speaks transformers' language.

A prompt holds the token ``<image>`` where its image belongs, once. The model takes that token out again, so it needs
no embedding, and a fusion puts the image where it wants it.

Shapes: B texts, L columns of token ids (padding and ``<image>`` included), P images, T text tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    Cache,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hive_scale import checksums
from hive_scale.chat_template import IMAGE, with_image_token, without_image
from hive_scale.config import ModelConfig
from hive_scale.config_merge import resolve, with_new_names
from hive_scale.model.build import drawn_model, language_config, meta_model
from hive_scale.model.cache import HiveCache
from hive_scale.model.generate import extend, prefill
from hive_scale.model.hive import Hive
from hive_scale.strangers import some

# the name of the cache among a forward's arguments and outputs, which differs between releases of transformers
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
IGNORED = -100  # label of a position without a target
PREFIX = "model."  # of tensor names in memory; files have none


class HiveConfig(PretrainedConfig):  # type: ignore[no-untyped-call]  # of its subclasses' registration
    """Config of a whole HIVE: ``config.json`` of an exported directory.

    Attributes:
        model: the fields of `hive_scale.config.ModelConfig`, with the whole config of each part and no path.
        data: how images and prompts were read in training.
        code: versions of the code that wrote it.
        image_token_id: id of the token ``<image>`` in prompts.
    """

    model_type = "hive"
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    code: dict[str, Any] | None = None
    image_token_id: int | None = None

    def model_config(self) -> ModelConfig:
        """The model's config. Raises ValueError if it is none, or names a path."""
        made = resolve(ModelConfig(), with_new_names(ModelConfig, self.model) if isinstance(self.model, dict) else {})
        if made.vision.path or made.language.path:
            raise ValueError("a path in config.json, where the whole config of each part is wanted")
        return made

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The LLM's config, whose `vocab_size` is the number of logits; this config, if it describes no model."""
        if not self.model:
            return self
        made = language_config(self.model_config().language)
        made.vocab_size = max(made.vocab_size, (self.image_token_id or 0) + 1)
        return made


class HiveForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]  # see above
    """`Hive` with the methods of a transformers model. `model` is the `Hive` itself.

    Files have `Hive`'s names of tensors. Generation may be greedy, by sampling, in beams, streamed and assisted. Each
    image is encoded once for all prompts and beams. `generate` makes its own cache, so ``cache_implementation`` is
    refused.
    """

    config_class = HiveConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as LLaVA has it
    supports_gradient_checkpointing = False

    def __init__(self, config: HiveConfig) -> None:
        super().__init__(config)
        self.model = drawn_model(config.model_config())
        dtype = torch.get_default_dtype()  # the one that transformers was asked for
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        tied = self.model.language.all_tied_weights_keys
        self._tied_weights_keys = {f"{PREFIX}language.{a}": f"{PREFIX}language.{b}" for a, b in tied.items()}
        config.tie_word_embeddings = bool(tied)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """Nothing: each part has drawn its weights already."""

    def get_input_embeddings(self) -> Any:
        return self.model.language.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.language.get_output_embeddings()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """As of any transformers model.

        Raises ValueError if weights are missing, for which transformers would draw new ones; RuntimeError, its own, for
        those of another shape; CorruptFile if files of a directory of ours are corrupt.
        """
        checksums.check(Path(str(pretrained_model_name_or_path)))
        wants_report = options.pop("output_loading_info", False)
        stock: Any = super()
        made, report = stock.from_pretrained(
            pretrained_model_name_or_path, *arguments, output_loading_info=True, **options
        )
        lost = {*report["missing_keys"], *(one[0] for one in report["mismatched_keys"])}
        if lost:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks weights, or has them in another shape: {some(sorted(lost))}: "
                "export the model again"
            )
        made.restore_buffers()
        return (made, report) if wants_report else made

    def restore_buffers(self) -> None:
        """Compute again what no file holds: pixel statistics and rotary frequencies, in float32."""
        fresh = meta_model(self.config.model_config())
        kept = self.model.state_dict().keys()
        for name, buffer in fresh.named_buffers():
            if name not in kept:
                owner, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(owner)
                module.register_buffer(leaf, buffer.to(module.get_buffer(leaf).device), persistent=False)

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As of any transformers model; tensors have the names of `Hive`'s parameters.

        A list of checksums in the directory is deleted, since it was of other files.
        """
        (Path(save_directory) / checksums.SUMS).unlink(missing_ok=True)
        state = options.pop("state_dict", None) or self.state_dict()
        tied = self.all_tied_weights_keys  # names that share another's tensor
        state = {name.removeprefix(PREFIX): one for name, one in state.items() if name not in tied}
        stock: Any = super()
        stock.save_pretrained(save_directory, *arguments, state_dict=state, **options)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As of any transformers model, with ``pixel_values`` and ``image_index`` as in `forward`.

        Raises ValueError for another cache than the model's own, and for an assistant that reads no images.
        """
        assistant = options.get("assistant_model")
        if assistant is not None and not isinstance(assistant, HiveForConditionalGeneration):
            raise ValueError(
                f"assistant_model is a {type(assistant).__name__}, which cannot read the prompt's {IMAGE}: give a "
                "smaller HIVE of the same tokenizer, or prompt_lookup_num_tokens"
            )
        given = options.get("generation_config")
        for name in ("cache_implementation", "prefill_chunk_size"):
            value = options.get(name) or getattr(given, name, None)
            if value is not None and not str(value).startswith("dynamic"):  # a growing one, as the model's own
                raise ValueError(f"{name}={value} is not for a HIVE, which makes its own cache: leave it out")
        if isinstance(pixels := options.get("pixel_values"), Tensor):
            options["pixel_values"] = (pixels,)  # transformers repeats a tensor for each beam, and a tuple never
        return super().generate(*arguments, **options)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The arguments of the next `forward`: columns that the cache does not hold yet, images for the first ones."""
        cache = kwargs.get(CACHE)
        done = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        total = input_ids.shape[1] if mask is None else mask.shape[1]
        made: dict[str, Any] = {
            "input_ids": input_ids[:, done - total :],
            "attention_mask": mask,
            CACHE: cache,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }
        if not done:
            made |= {"pixel_values": kwargs.get("pixel_values"), "image_index": kwargs.get("image_index")}
        return made

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits of the token after each column.

        Args:
            input_ids: int (B, L). Each text may hold the token ``<image>`` once; with a cache, only the new columns.
            attention_mask: 1 for tokens, 0 for padding, (B, L), or (B, all columns) with a cache; None: no padding.
            pixel_values: images (P, 3, H, W), normalised by the image processor, or uint8 at the encoder's size.
            image_index: int (B,), the image of each text. By default a text with ``<image>`` has the next image, or
                all have the only one.
            labels: int (B, L), the tokens to be predicted, at their own columns; -100 for none.
            cache: what an earlier call returned, to go on with its texts; transformers' name for it before 5.20 was
                `past_key_values`.
            past_key_values: see `cache`.
            use_cache: return a cache; by default True, unless there are `labels`.
            logits_to_keep: compute the logits of the last so many columns only; 0: all.
            return_dict: True or None; outputs are never tuples.

        Returns:
            `loss` (mean over labels, nats, a scalar) if there are labels; `logits` (B, L, vocabulary), -inf for
            ``<image>`` if that is no row of the LLM's head; the cache.

        Raises:
            ValueError: for images that are missing, or more than the texts have places for.
        """
        if return_dict is False:
            raise ValueError("return_dict=False: outputs have names here, leave it out")
        given = past_key_values if cache is None else cache
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if isinstance(given, HiveCache):
            is_token = mask[:, -input_ids.shape[1] :].bool()
            if input_ids.shape[1] > 1 and bool((input_ids == self.config.image_token_id).any()):
                raise ValueError(f"{IMAGE} in a text that goes on: an image belongs to the first part of a text")
            hidden, made = extend(self.model, given, input_ids, is_token), given
            hidden = hidden[:, -logits_to_keep:]
        else:
            _check_empty(given)
            images = pixel_values[0] if isinstance(pixel_values, Sequence) else pixel_values
            hidden, made = self._begin(input_ids, mask.bool(), images, image_index, logits_to_keep)
        logits = self._logits(hidden)
        wants_cache = labels is None if use_cache is None else use_cache
        return CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            **{CACHE: made if wants_cache else None},  # type: ignore[arg-type]
        )

    def encode_images(self, pixel_values: Tensor) -> list[Tensor]:
        """`Hive.encode_images` of pixels (P, 3, H, W), uint8 or normalised, in the precision of the encoder."""
        model: Hive = self.model
        if not pixel_values.is_floating_point():
            pixel_values = model.normalise(pixel_values)
        dtype = next(model.vision.parameters()).dtype
        return model.project(model.encode_normalised(pixel_values.to(dtype)))

    def _begin(
        self, ids_BL: Tensor, mask_BL: Tensor, pixels: Tensor | None, image_index: Tensor | None, keep: int
    ) -> tuple[Tensor, HiveCache]:
        """Run the first columns of texts. Returns hidden states (B, L or `keep`, D) and the cache."""
        is_image = mask_BL & (ids_BL == self._image_id())
        is_text = mask_BL & ~is_image
        has_image, length = is_image.any(1), is_text.sum(1)
        if bool((is_image.sum(1) > 1).any()):
            raise ValueError(f"a text holds {IMAGE} more than once: give it one image")
        if not bool(length.all()):
            raise ValueError("a text has no token: begin it with the start token, as the processor does")
        index = _image_of(has_image, pixels, image_index)
        # padding goes behind each text, where causal attention does not see it
        order = (~is_text).to(torch.uint8).argsort(dim=1, stable=True)
        tokens = torch.where(is_text, ids_BL, 0).gather(1, order)
        before = (is_text.cumsum(1) * is_image).sum(1)  # text tokens before the image
        slots = torch.where(has_image, before, 1)
        if pixels is None:  # features of no image, which no text sees
            weight = next(self.model.projector.parameters())
            seen = self.model.encode_images(weight.new_zeros(1, *self.model.features_shape))
        else:
            seen = self.encode_images(pixels)
        hidden, cache = prefill(self.model, seen, index, has_image, slots, tokens, length)
        cache.count_columns(ids_BL.shape[1])
        # the column of an image predicts what the token before it does: the token behind the image
        row = (is_text.cumsum(1) - 1).clamp(min=0)[:, -keep:]
        return hidden.take_along_dim(row[:, :, None], dim=1), cache

    def _image_id(self) -> int:
        if self.config.image_token_id is None:
            raise ValueError(
                f"config.json lacks image_token_id, the id of {IMAGE}: export the model again, or set "
                "model.config.image_token_id = processor.image_token_id"
            )
        return int(self.config.image_token_id)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden)
        lacking = (self.config.image_token_id or 0) + 1 - logits.shape[-1]
        # processors of logits look tokens of the prompt up here, the image's included; it is never written
        return F.pad(logits, (0, lacking), value=-torch.inf) if lacking > 0 else logits

    @staticmethod
    def _loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
        targets = labels_BL[:, 1:].flatten()
        return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED)


def _check_empty(given: Cache | None) -> None:
    """Raises ValueError for a cache that holds another model's keys, or that transformers was asked for."""
    if given is not None and (type(given) is not DynamicCache or given.offloading or given.get_seq_length()):
        raise ValueError(f"a {type(given).__name__} is not for a HIVE: give the cache that it returned, or none")


def _image_of(has_image_B: Tensor, pixels: Tensor | None, image_index: Tensor | None) -> Tensor:
    """Index of each text's image, int (B,). Raises ValueError unless images and places for them agree."""
    wanted, there = int(has_image_B.sum()), 0 if pixels is None else len(pixels)
    if there and not wanted:
        raise ValueError(f"there are images and no text holds {IMAGE}: write it where the image belongs")
    if wanted and not there:
        raise ValueError(f"{wanted} texts hold {IMAGE} and there are no pixel_values: give the images")
    if image_index is not None:
        index = torch.where(has_image_B, image_index.to(has_image_B.device), 0)
        if bool(((index < 0) | (index >= max(there, 1))).any()):
            raise ValueError(f"image_index is beyond the {there} images: number them from 0")
        return index
    if there > 1 and there != wanted:
        raise ValueError(
            f"{wanted} texts hold {IMAGE} and there are {there} images: give one for each, one for all, or image_index"
        )
    order = (has_image_B.cumsum(0) - 1).clamp(min=0)
    return order if there > 1 else torch.zeros_like(order)


class HiveProcessor(ProcessorMixin):
    """Image processor and tokenizer of a HIVE, which make its inputs as in training.

    Captions: a text is the beginning of a caption; it follows the start token and the image. Conversations: a text is
    a question, put to the model through the chat template. A text that holds ``<image>`` already is taken as it is.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, format: str = "caption"
    ) -> None:
        """`format` is the ``data.format`` of training: caption or conversation."""
        if format not in ("caption", "conversation"):
            raise ValueError(f"format={format}: give caption or conversation, as data.format was in training")
        tokenizer = with_image_token(tokenizer)
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)  # type: ignore[no-untyped-call]
        self.format = format
        self.image_token: str = IMAGE
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """As of any processor. Raises CorruptFile if files of a directory of ours are corrupt."""
        checksums.check(Path(str(pretrained_model_name_or_path)), weights=False)
        return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        *,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
        **options: Any,
    ) -> BatchFeature:
        """Inputs of the model for texts about images.

        Args:
            images: one for each text with an image, or one for all.
            text: one text or several; None: a caption of each image.
            videos: None; a HIVE has none.
            audio: None; a HIVE has none.
            padding: as of a tokenizer, on the left.
            return_tensors: as of a tokenizer.
            add_special_tokens: False if the chat template has been applied already.
            options: those of the image processor.

        Returns:
            ``input_ids``, ``attention_mask`` and, with images, ``pixel_values``.

        Raises:
            ValueError: if images and places for them do not agree.
        """
        if videos is not None or audio is not None:
            raise ValueError("a HIVE reads images and texts: leave out videos and audio")
        flat = None if images is None else _flat(self.image_processor.fetch_images(images))
        texts = [text] if isinstance(text, str) else list(text or [""] * len(flat or ()))
        marked = [IMAGE in one for one in texts]
        if flat and not any(marked) and add_special_tokens:
            marked = [True] * len(texts)
        if sum(marked) != len(flat or ()) and not (sum(marked) and flat and len(flat) == 1):
            raise ValueError(
                f"{sum(marked)} texts are about an image and {len(flat or ())} images are given: give one for each, "
                f"or one for all; {IMAGE} in a text marks its image"
            )
        rows = [self._ids(one, has, not add_special_tokens) for one, has in zip(texts, marked, strict=True)]
        made = self.tokenizer.pad(
            {"input_ids": rows}, padding=padding, padding_side="left", return_tensors=return_tensors
        )
        data = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        if flat:
            data["pixel_values"] = self.image_processor(flat, return_tensors=return_tensors, **options)["pixel_values"]
        return BatchFeature(data)

    def _ids(self, text: str, has_image: bool, is_rendered: bool) -> list[int]:
        if self.format == "caption":
            rest = without_image(text).removeprefix(self.start_token)
            ids = self.tokenizer(rest, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            start: int = self.tokenizer.convert_tokens_to_ids(self.start_token)
            return [start, *([self.image_token_id] if has_image else []), *ids]
        if not is_rendered and IMAGE not in text:
            content = [*([{"type": "image"}] if has_image else []), {"type": "text", "text": text}]
            text = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    @property
    def start_token(self) -> str:
        """The token that begins a caption."""
        start: str = self.tokenizer.bos_token or self.tokenizer.eos_token
        return start

    def apply_chat_template(self, conversation: Any, *arguments: Any, **options: Any) -> Any:
        """As of any processor; the template already writes the start token, where training had one."""
        if options.get("tokenize"):
            options["processor_kwargs"] = {**(options.get("processor_kwargs") or {}), "add_special_tokens": False}
        return super().apply_chat_template(conversation, *arguments, **options)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs."""
        return ["input_ids", "attention_mask", "pixel_values"]


def _flat(images: Any) -> list[Any]:
    """Images as a list, from one, a list, or lists of those of each text."""
    if not isinstance(images, list | tuple):
        return [images]
    return [one for group in images for one in (group if isinstance(group, list | tuple) else [group])]


AutoConfig.register("hive", HiveConfig, exist_ok=True)
AutoModel.register(HiveConfig, HiveForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(HiveConfig, HiveForConditionalGeneration, exist_ok=True)
AutoProcessor.register(HiveConfig, HiveProcessor, exist_ok=True)  # type: ignore[no-untyped-call]
