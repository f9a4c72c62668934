"""Conversations by a checkpoint's template: what the model reads, beside transformers' processor, and what is refused."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from llama_chat import BOS, EOT, IMAGE, PAD, REFUSING_TEMPLATE, TEMPLATE, special_tokens, write_tokenizer
from PIL import Image

from flamingo_export.errors import PromptError
from flamingo_export.runtime.chat import chat_prompt
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt
from flamingo_export.runtime.request import Request, prepare
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.runtime.videos import Video
from flamingo_reference.checkpoints.files.chat_template_files import read_chat_template
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.config import NANO, ModelConfig, TokenIds
from flamingo_reference.input_format import LLAMA_VISION, LLAMA_VISION_INSTRUCT, PAPER, InputFormat, with_template

ROWS = 400
IDS = special_tokens(ROWS)
INSTRUCT = with_template(LLAMA_VISION_INSTRUCT, TEMPLATE)
A, B = (np.full((20, 30, 3), value, np.uint8) for value in (10, 200))
CONFIG: ModelConfig = msgspec.structs.replace(
    NANO,
    language_model=msgspec.structs.replace(NANO.language_model, vocab_size=ROWS, extra_embeddings=8, tied_head=False),
    tokens=TokenIds(pad=IDS[PAD], bos=IDS[BOS], eoc=IDS[EOT], image=IDS[IMAGE]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer(folder, ROWS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    return Tokenizer(FastTokenizer.from_file(str(folder / "tokenizer.json")), CONFIG, LLAMA_VISION_INSTRUCT.tags)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    """transformers' own processor: template, first token, tags."""
    from transformers import AutoTokenizer, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    theirs = AutoTokenizer.from_pretrained(folder)
    return MllamaProcessor(
        MllamaImageProcessorPil(size={"height": 28, "width": 28}), theirs, chat_template=theirs.chat_template
    )


def ids_of(request: Request, tokenizer: Tokenizer, inputs: InputFormat = INSTRUCT) -> list[int]:
    found: list[int] = prepare(request, CONFIG, tokenizer, fit="pad", forms=inputs.prompts).token_ids.tolist()
    return found


def theirs(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    text = processor.apply_chat_template(messages, add_generation_prompt=True, date="26 Jul 2024")
    images = [Image.fromarray(A)] * text.count(IMAGE)
    # As transformers' examples call it: the template has the first token, which is not to be added again.
    found: list[int] = processor(images or None, text, add_special_tokens=False)["input_ids"][0]
    return found


def image(source: Any = None) -> dict[str, Any]:
    return {"type": "image"} if source is None else {"type": "image", "image": source}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text only": [{"role": "user", "content": "Why? "}],
    "image first": [{"role": "user", "content": [image(), text("What is this?")]}],
    "text first": [{"role": "user", "content": [text("What is this?"), image()]}],
    "image alone": [{"role": "user", "content": [image()]}],
    "adjacent images": [{"role": "user", "content": [image(), image(), text("Which is larger?")]}],
    "system and turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(), text("What is this?")]},
        {"role": "assistant", "content": "A flamingo."},
        {"role": "user", "content": [text("And "), image(), text("that?")]},
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_model_reads_what_transformers_gives_it(name: str, tokenizer: Tokenizer, processor: Any) -> None:
    messages = CONVERSATIONS[name]
    count = sum(part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"])
    found = ids_of(chat_prompt(messages, [A, B, A][:count], inputs=INSTRUCT), tokenizer)
    assert found == theirs(processor, messages)
    assert found.count(IDS[BOS]) == 1
    assert found[0] == IDS[BOS]


RAW = [
    "Hello",
    f"{IMAGE}Hello",
    f"{IMAGE}{IMAGE}Hello",
    f"{BOS}Hello",
    f"{IMAGE}{BOS}Hello",
    f"Look: {IMAGE} there",
    f"{BOS}{IMAGE}a",
]


@pytest.mark.parametrize("prompt", RAW)
def test_raw_prompts_get_the_first_token_where_transformers_puts_it(prompt: str, tokenizer: Tokenizer, processor: Any) -> None:
    images = [A] * prompt.count(IMAGE)
    found = ids_of(Request(prompt=prompt, media=images), tokenizer)
    expected = processor([Image.fromarray(A)] * len(images) or None, prompt, add_special_tokens=False)["input_ids"][0]
    assert found == expected
    assert found.count(IDS[BOS]) == 1


def test_a_question_with_examples_and_a_system_message(tokenizer: Tokenizer, processor: Any) -> None:
    shots = [Shot(medium=A, question="What colour?", answer="Black."), Shot(question="And grass?", answer="Green.")]
    request = qa_prompt(shots, "What is {question}?", [A, B], INSTRUCT, system="Be brief.")
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(), text("What colour?")]},
        {"role": "assistant", "content": "Black."},
        {"role": "user", "content": "And grass?"},
        {"role": "assistant", "content": "Green."},
        {"role": "user", "content": [image(), image(), text("What is {question}?")]},
    ]
    assert ids_of(request, tokenizer) == theirs(processor, messages)
    assert list(request.media) == [A, A, B]


def test_a_caption_asks_for_one(tokenizer: Tokenizer, processor: Any) -> None:
    messages = [{"role": "user", "content": [image(), text("Describe this image.")]}]
    assert ids_of(caption_prompt([], A, INSTRUCT), tokenizer) == theirs(processor, messages)


def test_sources_may_stand_in_the_messages() -> None:
    messages = [{"role": "user", "content": [image(A), image(), {"type": "video", "video": "clip.gif"}, text("Look.")]}]
    request = chat_prompt(messages, [B], inputs=INSTRUCT)
    assert request.media[0] is A
    assert request.media[1] is B
    assert request.media[2] == Video(source="clip.gif")


def test_the_day_stands_in_the_prompt() -> None:
    messages = [{"role": "user", "content": "a"}]
    assert "26 Jul 2024" in str(chat_prompt(messages, inputs=INSTRUCT).prompt)
    assert "05 Mar 2030" in str(chat_prompt(messages, inputs=INSTRUCT, day=datetime.date(2030, 3, 5)).prompt)


def test_a_system_message_beside_images_is_refused_in_the_templates_words() -> None:
    inputs = with_template(LLAMA_VISION_INSTRUCT, REFUSING_TEMPLATE)
    with pytest.raises(PromptError, match=r"No system message may stand before images\."):
        qa_prompt([], "What?", A, inputs, system="Be brief.")
    assert "Be brief." in str(qa_prompt([], "What?", None, inputs, system="Be brief.").prompt)


@pytest.mark.parametrize("special", [IMAGE, BOS, EOT, "<|start_header_id|>", "<|python_tag|>", "<|reserved_special_token_0|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_special_tokens_in_what_users_write_are_refused(special: str, role: str, tokenizer: Tokenizer) -> None:
    said = {"role": role, "content": f"a {special} b"}
    messages = {
        "system": [said, {"role": "user", "content": "a"}],
        "user": [said],
        "assistant": [{"role": "user", "content": "a"}, said, {"role": "user", "content": "a"}],
    }[role]
    with pytest.raises(PromptError, match="token of its own; give plain text"):
        ids_of(chat_prompt(messages, inputs=INSTRUCT), tokenizer)


@pytest.mark.parametrize(
    ("messages", "images", "said"),
    [
        ([], [], "messages is empty"),
        (["a"], [], r"messages\[0\] is a str"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], [], "tools are not offered"),
        ([{"role": "tool", "content": "3"}], [], "tools are not offered"),
        ([{"role": "robot", "content": "3"}], [], "the role is 'robot'"),
        ([{"role": "user", "content": 3}], [], "the content is int"),
        ([{"role": "user", "content": "a", "tools": []}], [], "has tools; known are role and content"),
        ([{"role": "user", "content": [{"type": "audio"}]}], [], "has a part"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], [], "has a part"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "shows an image that was not given"),
        ([{"role": "user", "content": "a"}], [A], "1 images were given, the messages show 0"),
        ([{"role": "user", "content": " "}], [], "neither text nor an image"),
        ([{"role": "system", "content": [{"type": "image"}]}], [A], "a system message holds text and nothing else"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], [], "an answer is empty"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], [], "the last message is the assistant's"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], [], "Users and assistants take turns"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[Any], images: list[Any], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        chat_prompt(messages, images, inputs=INSTRUCT)


def test_a_template_that_leaves_images_out_is_named() -> None:
    inputs = with_template(LLAMA_VISION_INSTRUCT, "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(PromptError, match=r"1 images are shown, the model's chat template writes 0 <\|image\|> tags"):
        qa_prompt([], "What?", A, inputs)


def test_models_without_a_template_have_their_forms() -> None:
    messages = [{"role": "user", "content": [image(), text("What?")]}]
    assert chat_prompt(messages, [A], inputs=PAPER).prompt == "<BOS><image>Question: What? Answer:"
    with pytest.raises(PromptError, match="no place for a system message"):
        chat_prompt([{"role": "system", "content": "a"}, *messages], [A], inputs=PAPER)
    with pytest.raises(PromptError, match="no place for a system message"):
        qa_prompt([], "What?", A, PAPER, system="a")
    with pytest.raises(PromptError, match="has one image, 2 were given"):
        qa_prompt([], "What?", [A, B], PAPER)
    assert str(qa_prompt([], "What?", A, LLAMA_VISION).prompt) == f"{BOS}{IMAGE}Question: What? Answer:"


def test_a_tuned_model_without_a_template_has_llamas_turns(tokenizer: Tokenizer) -> None:
    request = qa_prompt([Shot(question="Q", answer="A")], "What?", A, LLAMA_VISION_INSTRUCT)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = head.format("user"), head.format("assistant")
    assert request.prompt == f"{BOS}{user}Q{EOT}{assistant}A{EOT}{user}{IMAGE}What?{EOT}{assistant}"
    assert ids_of(request, tokenizer, LLAMA_VISION_INSTRUCT)[-3] == IDS["<|end_header_id|>"]


def test_tags_of_other_families_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"the prompt has 0 <\|image\|> tags, but 1 image or video was given"):
        ids_of(Request(prompt="<image>What?", media=[A]), tokenizer)
    with pytest.raises(PromptError, match="a tag of another family"):
        ids_of(Request(prompt="What?<EOC>"), tokenizer)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_templates_are_found_where_they_have_been_published(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path, ROWS, template_file=name)
    assert read_chat_template(tmp_path) == TEMPLATE


def test_the_newest_file_of_a_template_wins(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    write_tokenizer(tmp_path, ROWS, template="old", template_file="tokenizer_config.json")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "newer"}), encoding="utf-8")
    assert read_chat_template(tmp_path) == "newer"
    (tmp_path / "chat_template.jinja").write_text("newest", encoding="utf-8")
    assert read_chat_template(tmp_path) == "newest"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert read_chat_template(tmp_path) == "d"
    for wrong in (3, [], [{"name": "other", "template": "t"}], ["t"], {"default": 3}):
        path.write_text(json.dumps({"chat_template": wrong}), encoding="utf-8")
        with pytest.raises(CheckpointError, match="chat_template is neither a text nor a list with one called default"):
            read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CheckpointError, match="cannot be read as text"):
        read_chat_template(tmp_path)
