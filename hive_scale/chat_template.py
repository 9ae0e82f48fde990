"""The chat template of a tokenizer, as used by training, generation and every export.

Training locates answers and their ends in the output of the tokenizer's own template. An exported model gets other
programs' messages, so `exported` wraps the template such that it renders the text that training saw.
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

IMAGE = "<image>"  # placeholder for the image in a text, in LLaVA's records and in every prompt
Messages = Sequence[Mapping[str, str]]  # {"role": "system", "user" or "assistant", "content": text}

# used for tokenizers without a chat template: base models, bytes
CHAT_TEMPLATE = (
    "{{ bos_token | default(eos_token) }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
    "{% else %}{{ 'USER: ' if message.role == 'user' }}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# variables that templates ask for: no hidden reasoning, and no current date, which would change the prompt
DAY = datetime(2024, 7, 26)
VARIABLES = {"enable_thinking": False, "date_string": DAY.strftime("%d %b %Y")}
ANSWER = "\ue000{}\ue001"  # marks an answer during rendering; private-use characters, which no text holds

# Wrapper around the tokenizer's template: it turns content parts into text, puts the image where training had it, and
# ends a generation prompt where an answer began. `exported` fills in SETTINGS, TEMPLATE and the other capital words.
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

# Template of a model that was trained on captions, not conversations. CAPITAL words are filled in.
CAPTIONS = """\
{#- Written by hive_scale: a caption begins with the text of the messages, behind the image. -#}
{{- START -}}
{%- for message in messages -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ("image", "image_url") -%}<image>
{%- elif part.type == "text" -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message.role == "assistant" -%}{{- LAST if loop.last else EARLIER -}}{%- endif -%}
{%- endfor -%}
"""


def without_image(text: str, token: str = IMAGE) -> str:
    """Remove `token` from `text`, where it would stand for an image, until removing spells no new one."""
    while token in text:
        text = text.replace(token, "")
    return text


def with_image_token(tokenizer: Any) -> Any:
    """Copy a Hugging Face tokenizer, and add IMAGE to the copy as a special token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return tokenizer


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer, or `CHAT_TEMPLATE` if it has none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        if isinstance(own, dict):  # a tokenizer may have several templates, by name
            own = own.get("default")
        self.source: str = _without_today(own or CHAT_TEMPLATE)
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = {*tokenizer.all_special_tokens, *(token.content for token in added)} - {IMAGE}
        self.specials = sorted(names, key=len, reverse=True)  # longest first, so that a regex prefers the longest
        self.special = _any_of(self.specials)
        self._normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        # a tokenizer may match special tokens after normalising both text and token
        normal = {self._normal(token.content) for token in added if token.normalized}
        self._normal_special = _any_of([*self.specials, *(normal - {""})])

    def special_in(self, text: str) -> str:
        """The first special token that occurs in `text` or in its normalised form; "" if none does."""
        found = self.special.search(text) or self._normal_special.search(self._normal(text))
        return found[0] if found else ""

    def _normal(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def render(self, turns: Messages) -> str:
        """Render a conversation as text. For a template without system role, the first question gets its text.

        Raises ValueError if the template refuses the conversation.
        """
        text = self._render(turns if self.takes_system else _merged(turns))
        if text is None:
            raise ValueError("the tokenizer's chat template refuses a conversation of user and assistant")
        return text

    def around_answers(self, turns: Messages) -> list[str]:
        """The texts before, between and after the answers of `turns`: one more than there are answers.

        Marks are rendered in place of the answers. Rendering growing prefixes would not do: some templates drop, trim
        or add to earlier turns. Raises ValueError if the template does not show each answer once.
        """
        count = sum(turn["role"] == "assistant" for turn in turns)
        left = iter([ANSWER.format(i) for i in range(count)])
        marked = [{**turn, "content": next(left)} if turn["role"] == "assistant" else turn for turn in turns]
        between = re.split(ANSWER.format(r"\d+"), self.render(marked))
        if len(between) != count + 1:
            raise ValueError("the tokenizer's chat template does not show each answer once")
        return between

    def end_of_turn(self, text: str) -> int:
        """Index after the special token that starts `text`, which is what follows an answer.

        Raises ValueError if there is none: a model trained on such turns would never stop.
        """
        blank = len(text) - len(text.lstrip())
        found = self.special.match(text, blank)
        if not found:
            raise ValueError("the tokenizer's chat template ends answers without a special token: use another")
        return found.end()

    @cached_property
    def ends(self) -> list[str]:
        """Tokens that end the last answer of a conversation, and an earlier one; [] if it cannot be rendered."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}] * 2
        try:  # some templates end the last answer with another token than earlier ones
            behind = self.around_answers(turns)[:0:-1]
            return [text[: self.end_of_turn(text)].strip() for text in behind]
        except ValueError:  # that is reported where conversations are read
            return []

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids of tokens that end an answer: those of the template, then the end-of-text token."""
        ids: list[int] = [self._tokenizer.convert_tokens_to_ids(token) for token in self.ends]
        return list(dict.fromkeys([*ids, self._tokenizer.eos_token_id]))

    @cached_property
    def takes_system(self) -> bool:
        """True if the template renders the text of a system turn."""
        system = {"role": "system", "content": ANSWER.format(0)}
        text = self._render([system, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        return text is not None and system["content"] in text

    def exported(self, position: ImagePosition) -> str:
        """A template that renders other programs' messages (text or content parts) to the text that training saw.

        Raises ValueError for `position` "start" if the template renders no start token for the image to follow.
        """
        settings: dict[str, Any] = dict(VARIABLES)
        for name in ("bos_token", "eos_token"):  # pinned, since the exported tokenizer may define others
            if value := getattr(self._tokenizer, name):
                settings[name] = str(value)
        start = self.special.match(self.render([{"role": "user", "content": "?"}]))
        if position == "start" and not start:
            raise ValueError("the chat template begins without a special token: set data.image_position=user")
        source = self.source.removesuffix("\n")  # Jinja drops one line break at a template's end
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

    def captions(self) -> str:
        """A template for a model of captions: messages are the beginning of a caption, and answers end as here."""
        start = str(self._tokenizer.bos_token or self._tokenizer.eos_token)
        last, earlier = self.ends or ("", "")
        filled = {"START": _literal(start), "LAST": _literal(last), "EARLIER": _literal(earlier)}
        return re.sub("|".join(filled), lambda found: filled[found[0]], CAPTIONS)

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
    """Replace the current date in a template by a fixed one, by defining `strftime_now` for each format it uses."""
    formats = dict.fromkeys(found[2] for found in re.finditer(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", source))
    if not formats:
        return source
    dates = ", ".join(f"{_literal(one)}: {_literal(DAY.strftime(one))}" for one in formats)
    # Jinja drops the line break after this macro, so the template still starts at the beginning of a line
    return f"{{%- macro strftime_now(format) %}}{{{{ {{{dates}}}[format] }}}}{{%- endmacro %}}\n{source}"


def _merged(turns: Messages) -> Messages:
    """Move the text of leading system turns to the start of the first question."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    first, *rest = turns[len(system) :]
    return [{**first, "content": "\n\n".join([*system, first["content"]])}, *rest]


def _literal(value: str | bool) -> str:
    """`value` as a Jinja literal."""
    if isinstance(value, bool):
        return str(value).lower()
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
