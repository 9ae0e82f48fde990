"""The chat template of a tokenizer: what training, generation and every export make of a conversation.

Training finds answers and their ends in what the tokenizer's own template renders; an exported model is asked by
others, with their messages. `exported` therefore wraps that template, so that the same text comes out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken

from hive_scale.config import ImagePosition

IMAGE = "<image>"  # where a text has its image, in LLaVA's records and in every prompt
Turns = Sequence[Mapping[str, str]]  # {"role": "system", "user" or "assistant", "content": text}

# for tokenizers that come without a chat template: base models, bytes
CHAT_TEMPLATE = (
    "{{ bos_token | default(eos_token) }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
    "{% else %}{{ 'USER: ' if message.role == 'user' }}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# what templates ask for besides the turns: no hidden thoughts, and no date of today, which would change the prompt
VARIABLES = {"enable_thinking": False, "date_string": "26 Jul 2024"}
ANSWER = "\ue000{}\ue001"  # stands for an answer while a template is rendered; private use, so no text holds it

# Around the tokenizer's template: content parts become text, with each image where training had it, and what is asked
# ends where an answer began. SETTINGS, TEMPLATE and the like are filled in.
WRAPPER = """\
{#- Written by hive_scale around the tokenizer's own chat template: the text is the one that was trained on. -#}
SETTINGS
{%- set ns = namespace(messages=[], system="", images=0, text="") %}
{%- for message in messages %}
{%- set ns.text = message.content if message.content is string else "" %}
{%- if message.content is not string and message.content is iterable %}
{%- for part in message.content if part.type in ("image", "image_url") %}
{%- set ns.text = ns.text + "<image>\\n" %}
{%- endfor %}
{%- for part in message.content if part.type == "text" %}
{%- set ns.text = ns.text + part.text %}
{%- endfor %}
{%- endif %}
PLACE
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
{%- set rendered %}{{ "" }}TEMPLATE{{ "" }}{% endset %}
{%- if is_asked %}{% set rendered = rendered.split("MARK")[0].rstrip(" ") %}{% endif %}
"""
# the image at the head of its message, as the parts above have put it
AT_USER, AT_USER_END = "", "{{- rendered -}}"
# or behind the start token, wherever a message names it
AT_START = (
    '{%- set ns.images = ns.images + ns.text.count("<image>") %}'
    '{%- set ns.text = ns.text.replace("<image>\\n", "").replace("<image>", "") %}'
)
AT_START_END = "{{- START + '<image>' * ns.images + rendered[START | length:] -}}"


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
        self.source: str = own or CHAT_TEMPLATE
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*tokenizer.all_special_tokens, *added} - {IMAGE}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def special_in(self, text: str) -> str:
        """The first special token that `text` spells, or nothing."""
        found = self.special.search(text)
        return found[0] if found else ""

    def render(self, turns: Turns) -> str:
        """The text of a conversation; a template that knows no system role gets its text before the first question.

        Raises ValueError if the template refuses the conversation.
        """
        text = self._render(turns if self.takes_system else _merged(turns))
        if text is None:
            raise ValueError("the tokenizer's chat template refuses a conversation of user and assistant")
        return text

    def around_answers(self, turns: Turns) -> list[str]:
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
        eos: int = self._tokenizer.eos_token_id
        try:
            behind = self.around_answers([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])[1]
            token = behind[: self.end_of_turn(behind)].strip()
        except ValueError:  # conversations are refused where they are read
            return [eos]
        return list(dict.fromkeys([int(self._tokenizer.convert_tokens_to_ids(token)), eos]))

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
            "PLACE": AT_START if position == "start" else AT_USER,
            "MERGE": "false" if self.takes_system else "true",
            "MARK": ANSWER.format(0),
            "TEMPLATE": source,
        }
        end = AT_START_END.replace("START", _literal(start[0])) if position == "start" and start else AT_USER_END
        return re.sub("|".join(filled), lambda found: filled[found[0]], WRAPPER) + end

    def _render(self, turns: Turns) -> str | None:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], chat_template=self.source, tokenize=False, **VARIABLES
            )
        except TemplateError:
            return None
        return text


def _merged(turns: Turns) -> Turns:
    """`turns` with the text of leading system turns at the head of the first question."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    first, *rest = turns[len(system) :]
    return [{**first, "content": "\n\n".join([*system, first["content"]])}, *rest]


def _literal(value: str | bool) -> str:
    """As Jinja writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
