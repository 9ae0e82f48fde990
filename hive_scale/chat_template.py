"""The chat template of a tokenizer: what training, generation and every export make of a conversation.

Training finds answers and their ends in what the tokenizer's own template renders; an exported model is asked by
others, with their messages. `exported` therefore wraps that template, so that the same text comes out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken

from hive_scale.config import ImagePosition

IMAGE = "<image>"  # where a text has its image, in LLaVA's records and in every prompt
Messages = Sequence[Mapping[str, str]]  # {"role": "system", "user" or "assistant", "content": text}

# for tokenizers that come without a chat template: base models, bytes
CHAT_TEMPLATE = (
    "{{ bos_token | default(eos_token) }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
    "{% else %}{{ 'USER: ' if message.role == 'user' }}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# what templates ask for besides the turns: no hidden thoughts, and no date of today, which would change the prompt
DAY = datetime(2024, 7, 26)
VARIABLES = {"enable_thinking": False, "date_string": DAY.strftime("%d %b %Y")}
ANSWER = "\ue000{}\ue001"  # stands for an answer while a template is rendered; private use, so no text holds it

# Around the tokenizer's template: content parts become text, the image stands where training had it, and what is asked
# ends where an answer began. SETTINGS, TEMPLATE and the like are filled in.
WRAPPER = """\
{#- Written by hive_scale around the tokenizer's own chat template: the text is the one that was trained on. -#}
SETTINGS
{%- set ns = namespace(messages=[], texts=[], system="", images=0, text="", start="", asked=false) %}
{%- for message in messages %}
{%- set ns.text = message.content if message.content is string else "" %}
{%- if message.content is not string and message.content is iterable %}
{%- for part in message.content if part.type in ("image", "image_url") %}
{%- set ns.images = ns.images + 1 %}
{%- endfor %}
{%- for part in message.content if part.type == "text" %}
{%- set ns.text = ns.text + part.text %}
{%- endfor %}
{%- else %}
{%- set ns.images = ns.images + ns.text.count("<image>") %}
{%- endif %}
{%- set ns.texts = ns.texts + [ns.text.replace("<image>", "") | trim] %}
{%- endfor %}
{%- for message in messages %}
{%- set ns.text = ns.texts[loop.index0] %}
{%- if AT_USER and message.role == "user" and not ns.asked %}
{%- set ns.asked = true %}
{%- set ns.text = "<image>\\n" * ns.images + ns.text %}
{%- endif %}
{%- if MERGE and message.role == "system" %}
{%- set ns.system = ns.system + ns.text + "\\n\\n" %}
{%- else %}
{%- set ns.messages = ns.messages + [dict(message, content=ns.system + ns.text)] %}
{%- set ns.system = "" %}
{%- endif %}
{%- endfor %}
{%- set is_asked = add_generation_prompt is defined and add_generation_prompt %}
{%- set add_generation_prompt = false %}
{%- if is_asked %}{% set ns.messages = ns.messages + [{"role": "assistant", "content": "MARK"}] %}{% endif %}
{%- set messages = ns.messages %}
{%- set rendered %}
TEMPLATE{{ "" }}{% endset %}
{%- if is_asked %}{% set rendered = rendered.split("MARK")[0].rstrip(" ") %}{% endif %}
"""
AT_USER_END = "{{- rendered -}}"
AT_START_END = """\
{%- for token in SPECIALS if not ns.start and rendered.startswith(token) %}{% set ns.start = token %}{% endfor %}
{{- ns.start + "<image>" * ns.images + rendered[ns.start | length:] -}}"""


def without_image(text: str, token: str = IMAGE) -> str:
    """`text` without `token`, which would be an image of its own; also where leaving one out spells another."""
    while token in text:
        text = text.replace(token, "")
    return text


def with_image_token(tokenizer: Any) -> Any:
    """A copy of a Hugging Face tokenizer that has IMAGE as a special token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return tokenizer


class ChatTemplate:
    """`tokenizer` is a Hugging Face tokenizer, with a chat template or without."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several by name
            own = own.get("default")
        self.source: str = _without_today(own or CHAT_TEMPLATE)
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = {*tokenizer.all_special_tokens, *(token.content for token in added)} - {IMAGE}
        self.specials = sorted(names, key=len, reverse=True)  # longest first
        self.special = _any_of(self.specials)
        self._normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        # some are sought in the text's normal form, in a normal form of their own
        normal = {self._normal(token.content) for token in added if token.normalized}
        self._normal_special = _any_of([*self.specials, *(normal - {""})])

    def special_in(self, text: str) -> str:
        """The first special token that `text` spells, or that the tokenizer's normal form of it does, or nothing."""
        found = self.special.search(text) or self._normal_special.search(self._normal(text))
        return found[0] if found else ""

    def _normal(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def render(self, turns: Messages) -> str:
        """The text of a conversation; a template that knows no system role gets its text before the first question.

        Raises ValueError if the template refuses the conversation.
        """
        text = self._render(turns if self.takes_system else _merged(turns))
        if text is None:
            raise ValueError("the tokenizer's chat template refuses a conversation of user and assistant")
        return text

    def around_answers(self, turns: Messages) -> list[str]:
        """What stands before, between and behind the answers of `turns`, one text more than there are answers.

        Found by rendering with marks in the answers' place: some templates drop, trim or add to earlier turns, so
        that the text of fewer turns need not begin the text of more.
        """
        count = sum(turn["role"] == "assistant" for turn in turns)
        left = iter([ANSWER.format(i) for i in range(count)])
        marked = [{**turn, "content": next(left)} if turn["role"] == "assistant" else turn for turn in turns]
        between = re.split(ANSWER.format(r"\d+"), self.render(marked))
        if len(between) != count + 1:
            raise ValueError("the tokenizer's chat template does not show each answer once")
        return between

    def end_of_turn(self, text: str) -> int:
        """Where the special token ends that `text`, what stands behind an answer, begins with.

        Raises ValueError if there is none: who has learned from such turns never stops.
        """
        blank = len(text) - len(text.lstrip())
        found = self.special.match(text, blank)
        if not found:
            raise ValueError("the tokenizer's chat template ends answers without a special token: use another")
        return found.end()

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the one behind answers in the template first, then the end of text."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}] * 2
        try:  # some templates end the last answer otherwise than those before it
            behind = self.around_answers(turns)[:0:-1]
            tokens = [text[: self.end_of_turn(text)].strip() for text in behind]
        except ValueError:  # conversations are refused where they are read
            tokens = []
        ids: list[int] = [self._tokenizer.convert_tokens_to_ids(token) for token in tokens]
        return list(dict.fromkeys([*ids, self._tokenizer.eos_token_id]))

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system turn's text comes out of the template."""
        system = {"role": "system", "content": ANSWER.format(0)}
        text = self._render([system, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        return text is not None and system["content"] in text

    def exported(self, position: ImagePosition) -> str:
        """A template for others' messages, of text or of content parts, that renders what training saw.

        Raises ValueError if an image at the "start" has no start token before it.
        """
        settings: dict[str, Any] = dict(VARIABLES)
        for name in ("bos_token", "eos_token"):  # the exported tokenizer's may be others
            if value := getattr(self._tokenizer, name):
                settings[name] = str(value)
        start = self.special.match(self.render([{"role": "user", "content": "?"}]))
        if position == "start" and not start:
            raise ValueError("the chat template begins without a special token: set data.image_position=user")
        source = self.source.removesuffix("\n")  # jinja drops one at a template's end
        filled = {
            "SETTINGS": "".join(f"{{%- set {name} = {_literal(value)} %}}" for name, value in settings.items()),
            "AT_USER": _literal(position == "user"),
            "MERGE": _literal(not self.takes_system),
            "MARK": ANSWER.format(0),
            "TEMPLATE": source,
        }
        specials = f"[{', '.join(map(_literal, self.specials))}]"
        end = AT_USER_END if position == "user" else AT_START_END.replace("SPECIALS", specials)
        return re.sub("|".join(filled), lambda found: filled[found[0]], WRAPPER) + end

    def _render(self, turns: Messages) -> str | None:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], chat_template=self.source, tokenize=False, **VARIABLES
            )
        except TemplateError:
            return None
        return text


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")


def _without_today(source: str) -> str:
    """`source` with a date of its own for each that it asks today's clock for."""
    formats = dict.fromkeys(found[2] for found in re.finditer(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", source))
    if not formats:
        return source
    dates = ", ".join(f"{_literal(one)}: {_literal(DAY.strftime(one))}" for one in formats)
    # the line break behind it is Jinja's to drop, so that the template begins a line as before
    return f"{{%- macro strftime_now(format) %}}{{{{ {{{dates}}}[format] }}}}{{%- endmacro %}}\n{source}"


def _merged(turns: Messages) -> Messages:
    """`turns` with the text of leading system turns at the head of the first question."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    first, *rest = turns[len(system) :]
    return [{**first, "content": "\n\n".join([*system, first["content"]])}, *rest]


def _literal(value: str | bool) -> str:
    """As Jinja writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
