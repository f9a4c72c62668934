"""Images and prompts of each family: pixels beside transformers' own image processors, prompts beside its IDEFICS processor's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from flamingo_export.errors import PromptError
from flamingo_export.runtime.images import preprocess
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt
from flamingo_export.runtime.tokenizer import Tokenizer, with_tags_around
from flamingo_reference.config import NANO, ModelConfig, TokenIds
from flamingo_reference.input_format import IDEFICS, IDEFICS_INSTRUCT, OPENFLAMINGO, PAPER, InputFormat, with_bos

RNG = np.random.default_rng(5)
CLIP = msgspec.structs.replace(
    NANO,
    vision=msgspec.structs.replace(NANO.vision, image_size=224),
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
)
SIZES = [(224, 224), (300, 224), (224, 500), (640, 480), (480, 641), (100, 60), (61, 100), (1, 1), (3, 900), (1200, 800)]


def picture(width: int, height: int) -> np.ndarray[Any, Any]:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stretched_as_transformers_does_for_idefics(size: tuple[int, int]) -> None:
    pixels = picture(*size)
    theirs = np.asarray(IdeficsImageProcessorPil()(Image.fromarray(pixels), return_tensors="np"))[0]
    np.testing.assert_allclose(preprocess(pixels, CLIP, "stretch"), theirs, atol=2e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cropped_as_transformers_does_for_clip(size: tuple[int, int]) -> None:
    """Where the margin is uneven, theirs is rounded down and torchvision's, which training used, to nearest even: there one side has a
    pixel more, and theirs is compared with a picture whose margin is moved."""
    pixels = picture(*size)
    theirs = np.asarray(CLIPImageProcessorPil()(Image.fromarray(pixels), return_tensors="np")["pixel_values"])[0]
    ours = preprocess(pixels, CLIP, "crop")
    margin = max(int(224 * side / min(size)) for side in size) - 224
    moved = round(margin / 2) - margin // 2
    across = size[0] > size[1]
    if moved and across:
        ours, theirs = ours[:, :, :-1], theirs[:, :, 1:]
    elif moved:
        ours, theirs = ours[:, :-1], theirs[:, 1:]
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_line_of_pixels_does_not_take_memory() -> None:
    line = np.repeat(RNG.integers(0, 256, (1, 60_000, 1), dtype=np.uint8), 3, axis=2)
    square = preprocess(line, CLIP, "crop")  # as a whole it would have 224 x 13,440,000 pixels
    assert square.shape == (3, 224, 224)
    assert np.ptp(square, axis=1).max() < 1e-6  # every row is the one row's middle
    middle = (line[0, 29_995:30_005, 0] / 255 - 0.48145466) / 0.26862954
    assert middle.min() - 0.5 <= square[0].min() <= square[0].max() <= middle.max() + 0.5


def test_the_box_gives_what_resizing_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(901, 300)
    whole = preprocess(pixels, CLIP, "crop")
    monkeypatch.setattr("flamingo_export.runtime.images.MAX_PIXELS", 1000)
    np.testing.assert_allclose(preprocess(pixels, CLIP, "crop"), whole, atol=1.01 / 255 / 0.26)  # a grey level of rounding


def test_padding_is_the_default() -> None:
    pixels = picture(40, 20)
    assert (preprocess(pixels, NANO) == preprocess(pixels, NANO, "pad")).all()
    assert PAPER.fit == "pad"


# Prompts.


def test_prompts_of_openflamingos_evaluation() -> None:
    shots = [Shot(question="What is it?", answer="a cat", medium="a.png")]
    assert qa_prompt(shots, "Which {colour}?", "q.png", OPENFLAMINGO).prompt == (
        "<image>Question:What is it? Short answer:a cat<|endofchunk|><image>Question:Which {colour}? Short answer:"
    )
    captions = [Shot(answer="a cat", medium="a.png"), Shot(answer="text alone")]
    request = caption_prompt(captions, "q.png", OPENFLAMINGO)
    assert request.prompt == "<image>Output:a cat<|endofchunk|>Output:text alone<|endofchunk|><image>Output:"
    assert list(request.media) == ["a.png", "q.png"]
    assert caption_prompt([], "q.png", with_bos(OPENFLAMINGO, "<s>")).prompt == "<s><image>Output:"


def test_chat_of_idefics() -> None:
    """The example in the documentation of transformers' IdeficsProcessor."""
    image = "<fake_token_around_image><image><fake_token_around_image>"
    shots = [Shot(answer="An image of two kittens in grass.", medium="a.png")]
    assert caption_prompt(shots, "q.png", IDEFICS).prompt == (
        f"<s>User:{image}Describe this image.\nAssistant: An image of two kittens in grass.\nUser:{image}Describe this image.\nAssistant:"
    )
    assert qa_prompt([], "What is this?", "q.png", IDEFICS_INSTRUCT).prompt == (
        f"<s>User:{image}What is this?<end_of_utterance>\nAssistant:"
    )


@pytest.mark.parametrize("inputs", [PAPER, OPENFLAMINGO, IDEFICS, IDEFICS_INSTRUCT])
def test_tags_of_the_format_are_refused_in_plain_text(inputs: InputFormat) -> None:
    for tag in inputs.tags.all:
        with pytest.raises(PromptError, match="contains the tag"):
            qa_prompt([], f"What is {tag}?", "q.png", inputs)
        with pytest.raises(PromptError, match="contains the tag"):
            caption_prompt([Shot(answer=f"a {tag}")], "q.png", inputs)


FAKE = "<fake_token_around_image>"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("User: <image> What?", f"User: {FAKE}<image>{FAKE} What?"),
        ("<image><image>x<image>", f"{FAKE}<image>{FAKE}<image>{FAKE}x{FAKE}<image>{FAKE}"),
        (f"{FAKE}<image>{FAKE}<image>{FAKE}", f"{FAKE}<image>{FAKE}<image>{FAKE}"),
        (f"{FAKE}<image>{FAKE}{FAKE}<image>{FAKE}", f"{FAKE}<image>{FAKE}<image>{FAKE}"),
        (f"{FAKE} alone", f"{FAKE} alone"),
        ("no image", "no image"),
    ],
)
def test_tags_around_images(given: str, wanted: str) -> None:
    assert with_tags_around(given, IDEFICS.tags) == wanted
    assert with_tags_around(given, PAPER.tags) == given


def tokenizer(*special: str) -> Any:
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = FastTokenizer(models.BPE(vocab=letters, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.add_special_tokens(list(special))
    return fast


def config(**ids: Any) -> ModelConfig:
    lm = msgspec.structs.replace(NANO.language_model, vocab_size=300)
    return msgspec.structs.replace(NANO, language_model=lm, tokens=TokenIds(pad=0, **ids))


def test_encoding_as_each_family_does() -> None:
    idefics = Tokenizer(tokenizer("<s>", "</s>", FAKE, "<image>"), config(bos=256, eoc=257, image=259), IDEFICS.tags)
    (a,) = idefics.encode("a", add_bos=False)
    assert idefics.encode("<image>a") == [256, 258, 259, 258, a]
    open_flamingo = Tokenizer(tokenizer("<|endofchunk|>", "<image>"), config(bos=256, eoc=256, image=257), OPENFLAMINGO.tags)
    assert open_flamingo.encode("<image>a<|endofchunk|>") == [257, a, 256]


def test_a_tokenizer_without_the_familys_tags() -> None:
    with pytest.raises(PromptError, match=f"{FAKE} is missing"):
        Tokenizer(tokenizer("<s>", "</s>", "<image>"), config(bos=256, eoc=257, image=258), IDEFICS.tags)
    with pytest.raises(PromptError, match=r"<\|endofchunk\|> is missing, expected 256"):
        Tokenizer(tokenizer("<EOC>", "<image>"), config(bos=256, eoc=256, image=257), OPENFLAMINGO.tags)


def test_shots_file_prompts_use_the_bundles_forms(tmp_path: Path) -> None:
    from flamingo_export.bundle.manifest import Manifest, ShapeLimits, SourceRecord, write_manifest
    from flamingo_export.cli.common_options import formatted
    from flamingo_export.precision import Precision

    manifest = Manifest(
        config=NANO,
        precision=Precision(storage="fp32"),
        limits=ShapeLimits(max_length=64),
        source=SourceRecord(kind="random"),
        inputs=OPENFLAMINGO,
        graphs=(),
        files=(),
    )
    write_manifest(tmp_path, manifest)
    request = formatted(tmp_path, media=["a.png"], prompt=None, question="What?", shots=None, text_only=False)
    assert request.prompt == "<image>Question:What? Short answer:"
