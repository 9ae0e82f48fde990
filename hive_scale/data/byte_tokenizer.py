"""Text as its UTF-8 bytes, in the form in which any version of transformers saves and loads a tokenizer."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD, END, UNKNOWN = SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1 and 2, as ByT5 has them; byte b is b + 3


def byte_tokenizer() -> Tokenizer:
    """259 tokens. Bytes stand in the vocabulary as the characters that byte-level tokenizers write them as."""
    vocabulary = dict(zip([*SPECIAL, *_characters()], range(259), strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def _characters() -> list[str]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for what follows U+00FF, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
