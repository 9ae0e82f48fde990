"""An exported model is prompted with exactly the tokens it was trained on, whichever way other tools prompt it.

Why: templates contain dates and hidden thoughts, tokenizers add a start token or have none, and tools pass text,
content parts, or text with the image's token in it. Each way must give the tokens that training made of the same
conversation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoProcessor, PreTrainedTokenizerFast, pipeline

from hive_scale.chat_template import ChatTemplate
from hive_scale.config import DataConfig, ModelConfig, PartConfig
from hive_scale.data.conversation import prompt_with_slot, tokenize_conversation
from hive_scale.data.tokenizer import Tokenizer
from hive_scale.evaluate.vqa_runner import HiveAnswerer
from hive_scale.evaluate.vqa_types import ImageFile, Question
from hive_scale.export.huggingface import export_llava
from hive_scale.model.build import init_model

pytestmark = pytest.mark.contract
TEXT = "what is in the image ?"
# the templates of four families, as far as they differ
LLAMA32 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
QWEN2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if loop.last %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{{ '<|im_start|>' + ('model' if message['role'] == 'assistant' else 'user') + '
' + message['content'] | trim + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>model
'}}{% endif %}
"""


def tokenizer_of(template: str | None, bos: str | None, eos: str, adds_bos: bool, special: list[str]) -> Any:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    added: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=added, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["what is in the image user assistant system model"] * 9, trainer)
    if adds_bos:
        ids = [(bos, raw.token_to_id(bos))]
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=ids)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=special[0])
    made.chat_template = template
    return made


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILIES = {
    "Llama 3.2": tokenizer_of(LLAMA32, "<|begin_of_text|>", "<|eot_id|>", True, HEADERS),
    "Qwen2": tokenizer_of(QWEN2, None, "<|im_end|>", False, IM),
    "Qwen2 base": tokenizer_of(QWEN2, None, "<|endoftext|>", False, IM),  # texts end otherwise than turns
    "Qwen3": tokenizer_of(QWEN3, None, "<|im_end|>", False, IM),
    "SmolLM2": tokenizer_of(QWEN2, "<|im_start|>", "<|im_end|>", False, IM),
    "Gemma": tokenizer_of(GEMMA, "<|endoftext|>", "<|im_end|>", True, IM),
    "no template": tokenizer_of(None, "<|im_start|>", "<|im_end|>", True, IM),
}


@pytest.fixture(scope="module", params=[(f, p) for f in FAMILIES for p in ("user", "start")], ids=lambda p: " ".join(p))
def asked(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HiveAnswerer, Any]:
    """An exported LLaVA, the model it came from as we ask it, and where conversations have their image."""
    family, position = request.param
    tokenizer, folder = FAMILIES[family], tmp_path_factory.mktemp("llava")
    language = tiny.language("llama", vocab_size=330, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
    config = ModelConfig(
        PartConfig(config=tiny.SIGLIP), PartConfig(config=language), fusion="concat", encoder_layer_ratio=0.5
    )
    model = tiny.sighted(init_model(config, 2).eval(), 3)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    export_llava(config, weights, folder, tokenizer, "resize", position=position)
    asker = HiveAnswerer(model, DataConfig(image_transform="resize", image_position=position), torch.device("cpu"))
    asker.tokenizer = Tokenizer(tokenizer)
    return folder, asker, position


def image(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (tiny.IMAGE, tiny.IMAGE, 3), generator=torch.Generator().manual_seed(seed)).byte()
    return Image.fromarray(pixels.numpy())


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "image"}, {"type": "text", "text": text}]


SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [{"role": "user", "content": "is it red ?"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("before", [[], [SYSTEM], FIRST, [SYSTEM, *FIRST]], ids=["", "system", "turns", "both"])
def test_every_way_to_ask_gives_the_tokens_of_training(asked: Any, before: list[dict[str, str]]) -> None:
    folder, asker, position = asked
    tokenizer = asker.tokenizer
    turns = [*before, {"role": "user", "content": TEXT}]
    tokens, slot = prompt_with_slot(turns, tokenizer, position)
    trained = tokenize_conversation(
        "k", None, [*turns, {"role": "assistant", "content": "a cat"}], tokenizer, 999, position
    )
    assert list(trained.tokens[: len(tokens)]) == tokens
    assert trained.image_slot == slot
    processor = AutoProcessor.from_pretrained(folder)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    expected = [*tokens[:slot], *[image_id] * (tiny.IMAGE // 8) ** 2, *tokens[slot:]]
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
    wrapped = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    with_parts = [
        {**turn, "content": parts(turns[i]["content"])} if i == first else turn for i, turn in enumerate(wrapped)
    ]
    with_token = [
        {**turn, "content": f"<image>\n{turn['content']}"} if i == first else turn for i, turn in enumerate(turns)
    ]
    for said in (with_parts, with_token):
        whole = processor.apply_chat_template(
            said, add_generation_prompt=True, tokenize=False
        )  # as pipelines and most scripts do
        assert processor(images=image(), text=whole)["input_ids"][0] == expected
        assert processor.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False) == whole
    with_parts[first]["content"][0] = {"type": "image", "image": image()}
    at_once = processor.apply_chat_template(with_parts, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert at_once["input_ids"][0] == expected


def test_a_conversation_with_its_answers_is_what_was_trained(asked: Any) -> None:
    folder, asker, position = asked
    turns = [*FIRST, {"role": "user", "content": TEXT}, {"role": "assistant", "content": "a cat"}]
    sample = tokenize_conversation("k", None, turns, asker.tokenizer, 999, position)
    processor = AutoProcessor.from_pretrained(folder)
    said: list[dict[str, Any]] = [{**turns[0], "content": parts(turns[0]["content"])}, *turns[1:]]
    ids = processor(images=image(), text=processor.apply_chat_template(said))["input_ids"][0]
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert [token for token in ids if token != image_id] == list(sample.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_system_turns_are_rendered_by_the_template_itself_where_it_knows_them(family: str) -> None:
    tokenizer = FAMILIES[family]
    template = ChatTemplate(tokenizer)
    conversation = [SYSTEM, *FIRST]
    if family == "Gemma":  # which refuses them
        said = [{"role": "user", "content": f"Be brief.\n\n{FIRST[0]['content']}"}, FIRST[1]]
    else:
        said = conversation
    source, date = template.source, "26 Jul 2024"
    expected = tokenizer.apply_chat_template(said, chat_template=source, tokenize=False, date_string=date)
    assert template.render(conversation) == expected


@pytest.mark.parametrize("position", ["user", "start"])
@pytest.mark.parametrize("odd", ["<'>", '<">', "<\\>", "<\\n>", "<\n>", "<{{>"])
def test_an_exported_template_writes_special_tokens_of_any_spelling(odd: str, position: Any) -> None:
    tokenizer = tokenizer_of(None, odd, "<e>", False, [odd, "<e>"])
    said = [*FIRST, {"role": "user", "content": "why ?"}]
    exported = ChatTemplate(tokenizer).exported(position)
    text = tokenizer.apply_chat_template(said, chat_template=exported, add_generation_prompt=True, tokenize=False)
    assert text == f"{odd}USER: is it red ?\nASSISTANT: yes<e>USER: why ?\nASSISTANT:"


def test_an_image_in_its_message_leaves_the_beginning_of_the_text_alone() -> None:
    """Also where a text with a system turn begins with another special token than one without."""
    marks = "{{ {'system': '<s>', 'user': '<u>', 'assistant': '<a>'}[message.role] }}"
    template = f"{{% for message in messages %}}{marks}{{{{ message.content }}}}<e>{{% endfor %}}"
    tokenizer = tokenizer_of(template, None, "<e>", False, ["<e>", "<s>", "<u>", "<a>"])
    exported = ChatTemplate(tokenizer).exported("user")
    said = [SYSTEM, {"role": "user", "content": "why ?"}]
    text = tokenizer.apply_chat_template(said, chat_template=exported, add_generation_prompt=True, tokenize=False)
    assert text == "<s>Be brief.<e><u>why ?<e><a>"


def test_a_pipeline_answers_as_the_run_does(asked: Any, tmp_path: Path) -> None:
    folder, asker, _ = asked
    path = tmp_path / "image.png"
    image(3).save(path)
    [expected] = asker.answer([Question("q", TEXT, ImageFile("p", path.read_bytes), {})], 6)
    asks = pipeline("image-text-to-text", model=str(folder))
    said = [{"role": "user", "content": [{"type": "image", "image": image(3)}, {"type": "text", "text": TEXT}]}]
    [found] = asks(text=said, max_new_tokens=6, do_sample=False, return_full_text=False)
    assert found["generated_text"].strip() == expected.text


def test_a_question_with_the_images_token_in_it_is_asked_as_training_reads_it(asked: Any) -> None:
    """LLaVA's records spell the image at either end of the question, or in a later turn; others type it by mistake."""
    folder, asker, position = asked
    expected = prompt_with_slot([{"role": "user", "content": TEXT}], asker.tokenizer, position)
    for spelt in (f"<image>\n{TEXT}", f"{TEXT}\n<image>", f"  {TEXT} "):
        assert prompt_with_slot([{"role": "user", "content": spelt}], asker.tokenizer, position) == expected
    processor = AutoProcessor.from_pretrained(folder)
    for content in (f"{TEXT}\n<image>", parts(f" {TEXT} "), [*parts(f"{TEXT} <image>")]):
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        ids = processor(images=image(), text=text)["input_ids"][0]
        image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        assert [token for token in ids if token != image_id] == expected[0]
    later = [*FIRST, {"role": "user", "content": f"<image>\n{TEXT}"}]
    tokens, slot = prompt_with_slot([*FIRST, {"role": "user", "content": TEXT}], asker.tokenizer, position)
    ids = processor(images=image(), text=processor.apply_chat_template(later, add_generation_prompt=True))["input_ids"][
        0
    ]
    assert ids.index(image_id) == slot
    assert [token for token in ids if token != image_id] == tokens


def test_todays_date_is_not_asked_for() -> None:
    template = "{{ bos_token }}{{ strftime_now('%d %b %H:%M:%S %f') }}" + QWEN2
    tokenizer = Tokenizer(tokenizer_of(template, "<|endoftext|>", "<|im_end|>", False, IM))
    turns = [{"role": "user", "content": TEXT}]
    assert prompt_with_slot(turns, tokenizer, "user") == prompt_with_slot(turns, tokenizer, "user")
    assert "26 Jul 00:00:00 000000" in tokenizer.template.render(turns)
    assert "26 Jul" in tokenizer.template.exported("user")


def test_every_end_of_an_answer_is_one() -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = Tokenizer(tokenizer_of(template, None, "<|endoftext|>", False, IM))
    assert [tokenizer.stock.convert_ids_to_tokens(id) for id in tokenizer.end_ids] == ["<|endoftext|>", "<|im_end|>"]


def test_answers_that_the_template_would_change_are_refused() -> None:
    template = QWEN2.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
    tokenizer = Tokenizer(tokenizer_of(template, None, "<|im_end|>", False, IM))
    said = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "<think>so</think>yes"}]
    with pytest.raises(ValueError, match="chat template changes an answer"):
        tokenize_conversation("k", None, said, tokenizer, 999)
    assert tokenize_conversation("k", None, [said[0], {"role": "assistant", "content": "yes"}], tokenizer, 999)
