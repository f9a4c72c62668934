"""What a user calls: text in, text out, streams, and every mistake that a request can hold."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from PIL import Image

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest, write_manifest
from flamingo_export.bundle.tokenizer import placeholder_tokenizer
from flamingo_export.bundle.verify import file_record
from flamingo_export.errors import BusyError, ImageError, InputError, PromptError
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.prompts import caption_prompt, qa_prompt
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.videos import Video
from flamingo_export.sources import RandomSource
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import IDEFICS

from .conftest import LoadTiny, pictures, random_request


@pytest.fixture(scope="module")
def text_model(
    tiny_config: ModelConfig, bundle_writer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """The tiny sizes with random weights and a vocabulary of bytes, so that text goes in and (odd) text comes out."""
    config = msgspec.structs.replace(
        tiny_config, language_model=msgspec.structs.replace(tiny_config.language_model, vocab_size=262, max_positions=256)
    )
    bundle = bundle_writer(RandomSource(config, seed=1), tmp_path_factory.mktemp("text") / "text.bundle")
    (bundle / "tokenizer").mkdir()
    (bundle / "tokenizer" / "tokenizer.json").write_text(placeholder_tokenizer(config), encoding="utf-8")
    manifest = read_manifest(bundle)
    record = file_record(bundle, bundle / "tokenizer" / "tokenizer.json")
    write_manifest(bundle, msgspec.structs.replace(manifest, files=(*manifest.files, record)))
    with flamingo_export.load(bundle, threads=1) as model:
        yield model


def test_media_as_bytes_and_file_objects(text_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(8).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    expected = text_model.generate("<image>Output:", images=[path], max_new_tokens=4)
    with path.open("rb") as file:
        request = Request(prompt="<image>Output:", media=[file])
        for given in (Request(prompt="<image>Output:", media=[path.read_bytes()]), request, request):
            assert text_model.generate(given, max_new_tokens=4).token_ids == expected.token_ids


def test_text_in_text_out(text_model: Model, tmp_path: Path) -> None:
    image = pictures(0, 1)[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    found = text_model.generate("<image>Output:", images=[tmp_path / "a.png"], beams=3, max_new_tokens=6)
    assert text_model.tokenizer is not None
    assert found.text == text_model.tokenizer.decode(found.token_ids).strip()
    assert len(found.token_ids) == len(found.token_logprobs) <= 6
    ids = text_model.tokenizer.encode("<BOS><image>Output:")
    for request in (Request(prompt=ids, media=[image]), Request(prompt="<image>Output:", media=[Image.fromarray(image)])):
        assert text_model.generate(request, beams=3, max_new_tokens=6).token_ids == found.token_ids
    video = text_model.generate("<image>Output:", videos=[[image]], beams=3, max_new_tokens=6)
    assert video.token_ids == found.token_ids  # a video of one frame is an image


@pytest.mark.parametrize("settings", [{"beams": 1}, {"beams": 3}, {"temperature": 1.0, "seed": 1}])
def test_a_stream_gives_the_same_text_in_pieces(text_model: Model, settings: dict) -> None:  # type: ignore[type-arg]
    request = qa_prompt([], "What is it?", pictures(1, 1)[0])
    whole = text_model.generate(request, max_new_tokens=24, **settings)
    stream = text_model.stream(request, max_new_tokens=24, **settings)
    assert stream.result is None
    pieces = list(stream)
    assert stream.result is not None
    assert stream.result.token_ids == whole.token_ids
    assert "".join(pieces) == stream.result.text == whole.text
    assert all(pieces)
    assert len(pieces) > 1 or len(whole.text) == 1


def test_an_open_stream_holds_the_model_and_closing_frees_it(text_model: Model) -> None:
    stream = text_model.stream("Hello", max_new_tokens=20, beams=1)
    next(stream)
    with pytest.raises(BusyError, match="another generation is still running") as busy:
        text_model.generate("Hello", max_new_tokens=2)
    assert not isinstance(busy.value, InputError)  # nothing is wrong with the request
    next(stream)  # undisturbed
    stream.close()
    assert list(stream) == []
    assert text_model.generate("Hello", max_new_tokens=2).token_ids


def test_a_stream_that_is_dropped_frees_the_model(text_model: Model) -> None:
    for _ in text_model.stream("Hello", max_new_tokens=20, beams=1):
        break
    assert text_model.generate("Hello", max_new_tokens=2).token_ids


def test_a_stream_in_a_with_block_frees_the_model_however_it_ends(text_model: Model) -> None:
    with text_model.stream("Hello", max_new_tokens=20, beams=1) as stream:
        for _ in stream:
            break
    assert repr(stream).startswith("Stream(closed, ")
    text_model.generate("Hello", max_new_tokens=2)
    with pytest.raises(ZeroDivisionError), text_model.stream("Hello", max_new_tokens=20, beams=1) as failing:
        raise ZeroDivisionError(next(failing))
    text_model.generate("Hello", max_new_tokens=2)


def test_an_error_on_the_way_frees_the_model(text_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = text_model.stream("Hello", max_new_tokens=20, beams=1)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(stream._text, "push", lambda tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert list(stream) == []
    text_model.generate("Hello", max_new_tokens=2)


def test_another_thread_is_told_that_the_model_is_busy(text_model: Model) -> None:
    with text_model.stream("Hello", max_new_tokens=20, beams=1) as stream, ThreadPoolExecutor(1) as pool:
        next(stream)
        with pytest.raises(BusyError):
            pool.submit(text_model.generate, "Hello", max_new_tokens=2).result()


def test_blanks_at_a_prompts_end_change_nothing(text_model: Model) -> None:
    image = pictures(2, 1)[0]
    prompt, answers = "<image>Question: colour? Answer:", ["red", " green", "blue"]
    plain = text_model.score(prompt, answers, images=[image])
    text = text_model.generate(prompt, images=[image], max_new_tokens=8)
    for blank in (" ", "\t", "\u00a0"):
        moved = text_model.score(prompt + blank, answers, images=[image])
        asked = text_model.generate(prompt + blank, images=[image], max_new_tokens=8)
        assert asked.token_ids == text.token_ids
        # The blank begins each answer that has none of its own.
        assert moved[1].token_logprobs == pytest.approx(plain[1].token_logprobs, abs=1e-5)
        written = text_model.score(prompt, [f"{blank}red", f"{blank}blue"], images=[image])
        assert [moved[0].logprob, moved[2].logprob] == pytest.approx([each.logprob for each in written], abs=1e-5)
    lines = text_model.score(prompt + "\n", ["red"], images=[image])  # the end of a line belongs to the prompt
    assert len(lines[0].token_logprobs) == len("red") + 1


def test_helpers_take_the_bundles_form(text_model: Model, tmp_path: Path) -> None:
    a, b = pictures(6, 2)
    shots = [flamingo_export.Shot(answer="noise", medium=a)]
    written = text_model.generate("<image>Output: noise<EOC><image>Output:", images=[a, b], max_new_tokens=4)
    assert text_model.caption(b, shots=shots, max_new_tokens=4).token_ids == written.token_ids
    asked = text_model.generate("<image>Question: What? Answer:", images=[b], max_new_tokens=4)
    assert text_model.ask(b, "What?", max_new_tokens=4).token_ids == asked.token_ids
    Image.fromarray(a).save(tmp_path / "a.png")
    (tmp_path / "shots.jsonl").write_text('{"image": "a.png", "caption": "noise"}\n')
    assert text_model.caption(b, shots=tmp_path / "shots.jsonl", max_new_tokens=4).token_ids == written.token_ids
    for wrong in ("none.jsonl", ["noise"], 3):
        with pytest.raises(PromptError):
            text_model.caption(b, shots=wrong)  # type: ignore[arg-type]


def test_a_prompt_in_another_familys_form_is_refused(text_model: Model) -> None:
    image = pictures(6, 1)[0]
    request = caption_prompt([], image, IDEFICS)
    for call in (text_model.generate, text_model.stream, lambda request: text_model.score(request, ["a"])):
        with pytest.raises(
            PromptError, match=r"the prompt is in the form 'User:.*this bundle's is .*Question: .*model.caption"
        ):
            call(request)  # type: ignore[operator]
    with pytest.raises(PromptError, match=r"<fake_token_around_image>, a tag of another family .*<BOS>, <EOC>, <image>"):
        text_model.generate("<fake_token_around_image><image>x", images=[image])
    # Written by hand it is what the user asked for.
    assert text_model.generate("User:<image>Describe this image.\nAssistant:", images=[image], max_new_tokens=2).token_ids


def test_special_tokens_in_what_a_user_wrote_are_refused(text_model: Model) -> None:
    image = pictures(6, 1)[0]
    with pytest.raises(PromptError, match="contains <PAD>, which the model reads as a token of its own"):
        text_model.ask(image, "What is <PAD>?")
    with pytest.raises(PromptError, match="contains <PAD>"):
        text_model.caption(image, shots=[flamingo_export.Shot(answer="a <PAD>")])


def test_what_a_model_says_of_itself(text_model: Model) -> None:
    assert re.fullmatch(r"Model\('.*text\.bundle': Flamingo tiny, fp32, on onnxruntime, 256 cache slots\)", repr(text_model))
    found = text_model.generate("Hello", max_new_tokens=3, num_return=2)
    assert re.fullmatch(r"Generation\('.*', 3 tokens, score -\d+\.\d+, cut at max_new_tokens\)", repr(found))
    assert re.fullmatch(r"Text\('.*', \d tokens, score -\d.*\)", repr(found.alternatives[0]))
    assert repr(Request(prompt="<image>x", media=pictures(0, 1))) == "Request('<image>x', 1 medium)"
    assert repr(Request(prompt=[1, 5], seed=3)) == "Request(2 token ids, 0 media, seed 3)"
    assert repr(text_model.tokenizer) == "Tokenizer(262 tokens, tags <BOS> <EOC> <image>)"


def test_the_readers_time_is_no_part_of_a_step(text_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # each look at it takes a second
    monkeypatch.setattr("flamingo_export.runtime.generator.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    stream = text_model.stream("Hello there", max_new_tokens=6, beams=1)
    for _ in stream:
        for _ in range(1000):
            next(clock)
    assert stream.result is not None
    assert stream.result.timings.steps
    assert max(stream.result.timings.steps) < 10


def test_candidates_as_text(text_model: Model) -> None:
    image = pictures(2, 1)[0]
    found = text_model.score("<image>Question: colour? Answer:", ["red", " red", "blue<EOC>"], images=[image])
    assert [score.candidate for score in found] == ["red", " red", "blue<EOC>"]
    assert found[0].logprob == pytest.approx(found[1].logprob)
    assert len(found[2].token_logprobs) == len(" blue") + 1
    assert len(found[0].token_logprobs) == len(" red") + 1
    # Told to leave the end open, it scores the words.
    words = text_model.score("<image>Question: colour? Answer:", ["red", "blue<EOC>"], images=[image], end=False)
    assert words[0].token_logprobs == pytest.approx(found[0].token_logprobs[:-1], abs=1e-5)
    assert words[1].token_logprobs == pytest.approx(found[2].token_logprobs, abs=1e-5)
    # Token ids are scored as they are.
    (ids,) = text_model.score("<image>Question: colour? Answer:", [[5, 6]], images=[image])
    assert len(ids.token_logprobs) == 2


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        (
            "<image>Output:",
            0,
            "the prompt has 1 <image> tag, but 0 images or videos were given. Give an image or video for each tag",
        ),
        ("<image><image>Output:", 1, "the prompt has 2 <image> tags, but 1 image or video was given"),
        ("Output:", 2, "the prompt has 0 <image> tags, but 2 images or videos were given. Add a tag for each"),
        ("", 0, "the prompt is empty"),
        ("   ", 0, "the prompt is empty"),
        ([], 0, "the prompt is empty"),
        ([1, 300], 0, "token ids go from 1 to 300, the model knows 0 to 261"),
        ([-1, 5], 0, "token ids go from -1 to 5"),
        ([0.5, 5.0], 0, "token ids are float64"),
        ([[1, 2], [3, 4]], 0, r"shape \(2, 2\)"),
        (None, 0, "a prompt is given as NoneType"),
    ],
)
def test_prompts_that_do_not_fit(text_model: Model, prompt: object, count: int, message: str) -> None:
    for call in (text_model.generate, text_model.stream):
        with pytest.raises(PromptError, match=message):
            call(prompt, images=pictures(3, count))  # type: ignore[operator]


def test_media_that_do_not_fit(text_model: Model, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        text_model.generate("<image>", images=[tmp_path / "none.png"])
    with pytest.raises(InputError, match=r"images and videos are lists: images=\['a.png'\]"):
        text_model.generate("<image>", images="a.png")
    for single in (b"bytes of a file", io.BytesIO(b"the same")):
        with pytest.raises(InputError, match="images and videos are lists"):
            text_model.generate("<image>", images=single)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="are lists"):
        text_model.generate("<image>", images=pictures(0, 1)[0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a Request carries its own media"):
        text_model.generate(Request(prompt="<image>"), images=pictures(0, 1))
    with pytest.raises(InputError, match="give each its media"):
        text_model.generate(["<image>", "<image>"], images=pictures(0, 2))  # type: ignore[call-overload]
    with pytest.raises(InputError, match="batch_size is 0"):
        text_model.generate(["Hello"], batch_size=0)


def test_a_list_is_answered_in_order(text_model: Model) -> None:
    images = pictures(4, 2)
    requests = [Request(prompt="<image>Output:", media=[image]) for image in images]
    found = text_model.generate([*requests, "Hello there"], beams=1, max_new_tokens=4)
    assert [one.token_ids for one in found] == [
        text_model.generate(request, beams=1, max_new_tokens=4).token_ids
        for request in [*requests, "Hello there"]  # type: ignore[list-item]
    ]


def test_without_a_tokenizer_ids_go_in_and_out(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    model = load_tiny()
    assert model.generate(random_request(tiny_config, 1, 6, 1), max_new_tokens=2).text == ""
    with pytest.raises(PromptError, match="the bundle has no tokenizer, so text cannot be encoded"):
        model.generate("Hello")
    with pytest.raises(InputError, match="no text to stream"):
        model.stream([1, 5])


def test_images_and_videos_may_be_mixed(text_model: Model) -> None:
    a, b, c = pictures(5, 3)
    found = text_model.generate(Request(prompt="<image>x<image>y", media=[Video(source=[a, b]), c]), max_new_tokens=3)
    split = text_model.generate("<image>x<image>y", images=[Video(source=[a, b]), c], max_new_tokens=3)
    swapped = text_model.generate("<image>x<image>y", images=[c], videos=[[a, b]], max_new_tokens=3)
    assert found.token_logprobs == pytest.approx(split.token_logprobs, abs=1e-4)
    assert found.token_logprobs != pytest.approx(swapped.token_logprobs, abs=1e-4)


def test_importing_is_quick_and_needs_no_torch() -> None:
    """Heavy packages come with the first use, torch never."""
    code = (
        "import sys, flamingo_export\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'numpy', 'PIL', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import flamingo_export.runtime.model, flamingo_export.backends.registry\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'onnx_ir', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert flamingo_export.Video and 'generate' in dir(flamingo_export.Model)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(flamingo_export.__all__) <= set(dir(flamingo_export))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flamingo_export.nonsense  # noqa: B018


def test_a_generation_without_torch(text_model: Model) -> None:
    """The whole way in a process where torch cannot be imported."""
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'onnx_ir'):\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import numpy as np, flamingo_export\n"
        "model = flamingo_export.load(sys.argv[1], threads=1)\n"
        "print(model.generate('<image>Output:', images=[np.zeros((8, 8, 3), np.uint8)], max_new_tokens=3).token_ids)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(text_model.bundle)], check=True, capture_output=True, text=True)
    expected = text_model.generate("<image>Output:", images=[np.zeros((8, 8, 3), np.uint8)], max_new_tokens=3)
    assert result.stdout.strip() == str(expected.token_ids)
