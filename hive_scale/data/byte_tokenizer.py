"""Byte-level tokenizer (UTF-8 bytes), stored in a form that every version of transformers can save and load."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD, END, UNKNOWN = SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1 and 2 as in ByT5; byte b has id b + 3


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of 259 tokens: 3 special tokens and 256 bytes, written in GPT-2's byte-level alphabet."""
    vocabulary = dict(zip([*SPECIAL, *_characters()], range(259), strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def _characters() -> list[str]:
    """GPT-2's byte alphabet: printable Latin-1 bytes map to themselves, the others to U+0100 and up, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
