"""Text to tokens and back: captions as they are, conversations through the tokenizer's own chat template."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from hive_scale import checksums, strict_json
from hive_scale.batch import Sample
from hive_scale.chat_template import IMAGE, ChatTemplate, with_image_token
from hive_scale.config import TokenizerConfig
from hive_scale.data.byte_tokenizer import END, PAD, UNKNOWN, byte_tokenizer
from hive_scale.locate import locate

logger = logging.getLogger(__name__)

# data workers tokenize in parallel: the tokenizer's own threads would oversubscribe CPUs, and do not survive a fork
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Tokenizer:
    """Text to token ids and back. The start token is the beginning-of-text token, or the end token if there is none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.is_fast:  # ignore padding and truncation settings of the tokenizer's file
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_id: int = tokenizer.eos_token_id
        bos_id = tokenizer.bos_token_id
        self.start_id: int = self.eos_id if bos_id is None else bos_id
        self.vocab_size: int = len(tokenizer)
        self.template = ChatTemplate(tokenizer)
        # <unk> is ordinary text, unless the vocabulary uses the same token as end or start
        self._special_ids = {*tokenizer.all_special_ids} - ({tokenizer.unk_token_id} - {self.eos_id, self.start_id})

    @property
    def stock(self) -> Any:
        """The underlying Hugging Face tokenizer, to be saved beside an exported model."""
        return self._tokenizer

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """Return [start] + text + [end], the text truncated so that all are at most `max_tokens`."""
        return self.encode_all([text], max_tokens)[0]

    def encode_all(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Encode each text as `encode` does; one call takes half the time."""
        return [[self.start_id, *ids[: max_tokens - 2], self.eos_id] for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Same result as the tokenizer's `encode` without special tokens, in a fraction of the time.

        A special token spelled in a text is treated as plain text: otherwise it would end, or begin, the caption
        midway.
        """
        found = self._plain(texts)
        return [
            ids if self._special_ids.isdisjoint(ids) else self._cut(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            return [self._tokenizer.encode(text, **options) for text in texts]
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = True  # set each time, since other calls of the tokenizer reset it
        return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _cut(self, text: str) -> list[int]:
        """Tokenize for vocabularies in which a special token is also a word: split `text` inside each such word.

        Special tokens that remain are dropped, such as for an unknown character if the vocabulary uses the end token
        for it.
        """
        if self._tokenizer.is_fast:  # the backend also finds tokens that appear only after normalization
            found = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            placed = zip(found.ids, found.offsets, strict=True)
            cuts = [start + 1 for id, (start, _) in placed if id in self._special_ids]
        else:
            cuts = [match.start() + 1 for match in self.template.special.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        return [id for ids in self._plain(parts) for id in ids if id not in self._special_ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer or a caption."""
        return self.template.end_ids

    @cached_property
    def _with_image(self) -> Any:
        """A copy in which IMAGE is a token that splits the text, as in the processor of an exported model."""
        return with_image_token(self._tokenizer)

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool], int]:
        """Return (token ids, flags, slot) of the parts' joined text: a token has the flag of the part in which it ends.

        The slot is the number of tokens before IMAGE, which itself is left out; 1 if there is none.
        """
        texts, tokenizer = [text for text, _ in parts], self._with_image
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        if not tokenizer.is_fast:  # slow tokenizers report no offsets
            pieces = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
            flags = [flag for piece, (_, flag) in zip(pieces, parts, strict=True) for _ in piece]
            ids = [token for piece in pieces for token in piece]
        else:
            found = tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True)
            ends = list(accumulate(map(len, texts)))
            places = np.searchsorted(ends, [end for _, end in found["offset_mapping"]])
            ids, flags = found["input_ids"], [parts[place][1] for place in places]
        if image not in ids:
            return ids, flags, 1
        slot = ids.index(image)
        return ids[:slot] + ids[slot + 1 :], flags[:slot] + flags[slot + 1 :], slot


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer that `config` names; code in a checkpoint is never executed.

    Raises ValueError if it cannot be loaded, or has no padding or end token.
    """
    if config.path == "bytes":
        special = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
        stock: Any = PreTrainedTokenizerFast
        return Tokenizer(stock(tokenizer_object=byte_tokenizer(), **special))
    place = locate(config.path, "data.tokenizer.path")
    if Path(place).is_file():
        raise ValueError(f"data.tokenizer.path={config.path} is a file: give the directory of a tokenizer")
    try:
        checksums.check(Path(place), weights=False)
        # transformers would warn that it does not know the model type of our own exports
        known = {"config": PreTrainedConfig()} if _is_whole_hive(Path(place) / "config.json") else {}
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **known)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"data.tokenizer.path={config.path} cannot be loaded: {reason}: give a tokenizer's directory, or a name on "
            "the hub"
        ) from None
    if config.pad_token and config.pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = config.pad_token
    elif config.pad_token and tokenizer.pad_token_id is None:
        raise ValueError(
            f"data.tokenizer.pad_token={config.pad_token} is not in the vocabulary of {config.path}: name one of "
            "its tokens, such as <unk>"
        )
    elif config.pad_token:  # a preset's, whose LLM has been replaced; padding is masked, so any token will do
        logger.warning(
            "data.tokenizer.pad_token=%s is not in the vocabulary of %s, whose own %s is used",
            config.pad_token, config.path, tokenizer.pad_token,
        )  # fmt: skip
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer {config.path} has no padding token: set data.tokenizer.pad_token to one of its tokens, "
            "such as <unk>"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {config.path} has no end token: use one whose eos_token is set")
    return Tokenizer(tokenizer)


def _is_whole_hive(file: Path) -> bool:
    content = strict_json.read(file) if file.is_file() else None
    return isinstance(content, dict) and content.get("model_type") == "hive"


def caption_sample(key: str, pixels: Tensor | None, text: str, tokenizer: Tokenizer, max_tokens: int) -> Sample:
    """Return an image with its tokenized caption: every token but the start is a target."""
    return captioned(key, pixels, tokenizer.encode(text, max_tokens))


def captioned(key: str, pixels: Tensor | None, tokens: Sequence[int]) -> Sample:
    """Return an image with the tokens of its caption, which come from `Tokenizer.encode`."""
    return Sample(key, pixels, tokens, [False] + [True] * (len(tokens) - 1))
