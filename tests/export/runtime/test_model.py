"""What a user calls: text in, text out, streams, and every mistake that a request can hold."""

from __future__ import annotations

import asyncio
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from PIL import Image

import flamingo_export
from flamingo_export.bundle.bundled_tokenizer import placeholder_tokenizer
from flamingo_export.bundle.manifest import read_manifest, write_manifest
from flamingo_export.bundle.verify import file_record
from flamingo_export.errors import BackendError, DeadlineExceeded, EngineClosed, ImageError, InputError, PromptError, QueueFull
from flamingo_export.estimates import opened_weights
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.prompts import caption_prompt, qa_prompt
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.ticket import Tokens
from flamingo_export.runtime.videos import Video
from flamingo_export.sources import RandomSource
from flamingo_export.weights import WeightIndex
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
    (bundle / "tokenizer" / "tokenizer.json").write_text(placeholder_tokenizer(config), encoding="utf-8")  # type: ignore[arg-type]
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
def test_a_stream_gives_the_same_text_in_pieces(text_model: Model, settings: dict[str, Any]) -> None:
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


def test_a_stream_left_open_holds_up_nobody(text_model: Model) -> None:
    alone = text_model.generate("Hello", max_new_tokens=20, beams=1)
    stream = text_model.stream("Hello", max_new_tokens=20, beams=1)
    first = next(stream)
    other = text_model.generate("Goodbye", max_new_tokens=3)
    assert other.token_ids == text_model.generate("Goodbye", max_new_tokens=3).token_ids
    assert (first + "".join(stream)).strip() == alone.text


def rows_in_use(model: Model) -> int:
    """After what was given up has left, which takes a step at most."""
    deadline = time.monotonic() + 10
    while (stats := model.engine.stats()).rows_in_use and time.monotonic() < deadline:
        time.sleep(0.005)
    assert stats.bank_rows_in_use == stats.rows_in_use
    return stats.rows_in_use


def slow_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the decoder takes 10 ms longer, so that what is given up is not finished before."""
    run = model.engines.decoder.run

    def slow(*args: Any, **rest: Any) -> Any:
        time.sleep(0.01)
        return run(*args, **rest)

    monkeypatch.setattr(model.engines.decoder, "run", slow)


def test_closing_or_dropping_a_stream_frees_its_row(text_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(text_model, monkeypatch)
    cancelled = text_model.engine.stats().cancelled
    stream = text_model.stream("Hello", max_new_tokens=60, beams=1)
    next(stream)
    stream.close()
    assert list(stream) == []
    for _ in text_model.stream("Hello", max_new_tokens=60, beams=1):
        break
    assert rows_in_use(text_model) == 0
    assert text_model.engine.stats().cancelled == cancelled + 2


def test_what_is_given_up_is_gone_before_the_next_step(text_model: Model) -> None:
    engine, options = text_model.engine, GenerateOptions(beams=1, max_new_tokens=60)
    with engine.by_hand() as loop:
        tickets = [engine.submit(text_model.prepare(Request(prompt="Hello")), options, wake=False) for _ in range(2)]
        while len(loop.schedule.decoding) < 2:
            assert loop.tick()
        (job,) = (job for job in loop.schedule.decoding if job.ticket is tickets[0])
        chosen = job.chosen
        tickets[0].cancel()
        assert loop.tick()
        assert tickets[0].done
        assert (job.chosen, engine.stats().running) == (chosen, 1)
        tickets[1].cancel()
        assert not loop.tick()
        assert (engine.stats().running, engine.stats().rows_in_use) == (0, 0)


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


def test_blanks_at_a_prompts_end_change_nothing(text_model: Model) -> None:
    image = pictures(2, 1)[0]
    prompt, answers = "<image>Question: colour? Answer:", ["red", " green", "blue"]
    plain = text_model.score(prompt, answers, images=[image])
    text = text_model.generate(prompt, images=[image], max_new_tokens=8)
    for blank in (" ", "   ", "\t", "\u00a0"):
        moved = text_model.score(prompt + blank, answers, images=[image])
        asked = text_model.generate(prompt + blank, images=[image], max_new_tokens=8)
        assert asked.token_ids == text.token_ids
        for one, other in zip(moved, plain, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)
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
    wrong: Any
    for wrong in ("none.jsonl", ["noise"], 3):
        with pytest.raises(PromptError):
            text_model.caption(b, shots=wrong)


def test_a_prompt_in_another_familys_form_is_refused(text_model: Model) -> None:
    image = pictures(6, 1)[0]
    request = caption_prompt([], image, IDEFICS)
    for call in (text_model.generate, text_model.stream, lambda request: text_model.score(request, ["a"])):
        with pytest.raises(
            PromptError, match=r"the prompt is in the form 'User:.*this bundle's is .*Question: .*model.caption"
        ):
            call(request)
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


def test_a_slow_reader_holds_up_no_step(text_model: Model) -> None:
    """Its request is finished while nobody reads, and the time of steps is not the reader's."""
    stream = text_model.stream("Hello there", max_new_tokens=6, beams=1)
    next(stream)
    assert rows_in_use(text_model) == 0
    time.sleep(0.3)
    list(stream)
    assert stream.result is not None
    assert stream.result.timings.steps
    assert sum(stream.result.timings.steps) < 0.3


def test_many_threads_share_a_model(text_model: Model) -> None:
    """Each gets the answer that it gets alone, whatever the others ask; a fifth of them give up on the way."""
    images = pictures(7, 4)
    kinds: list[dict[str, Any]] = [
        {"beams": 1},
        {"beams": 3},
        {"temperature": 1.0, "seed": 3, "num_return": 2},
        {"beams": 2, "max_new_tokens": 3},
    ]
    asked: list[dict[str, Any]] = [
        {"prompt": f"<image>{'x' * (7 * index)}Output:", "images": [images[index % 4]], **settings}
        for index, settings in enumerate(kinds * 3)
    ]
    alone = [text_model.generate(**{"max_new_tokens": 12, **one}) for one in asked]

    def work(number: int) -> None:
        index = number % len(asked)
        one = {"max_new_tokens": 12, **asked[index]}
        if number % 5 == 4:
            stream = text_model.stream(**one)
            next(stream)
            return
        found = text_model.generate(**one)
        texts = [[text.token_ids for text in (each, *each.alternatives)] for each in (found, alone[index])]
        assert texts[0] == texts[1]
        np.testing.assert_allclose(found.token_logprobs, alone[index].token_logprobs, atol=1e-3)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(60)))
    assert rows_in_use(text_model) == 0


def test_asyncio(text_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [text_model.generate(prompt, max_new_tokens=8).token_ids for prompt in ("Hello", "Goodbye")]

    async def together() -> list[tuple[int, ...]]:
        found = await asyncio.gather(*(text_model.agenerate(prompt, max_new_tokens=8) for prompt in ("Hello", "Goodbye")))
        found += await text_model.agenerate(["Hello", "Goodbye"], max_new_tokens=8, batch_size=1)
        return [one.token_ids for one in found]

    assert asyncio.run(together()) == expected * 2
    slow_steps(text_model, monkeypatch)
    cancelled = text_model.engine.stats().cancelled

    async def given_up() -> None:
        task = asyncio.create_task(text_model.agenerate("Hello", beams=1, max_new_tokens=60))
        while not (text_model.engine.stats().running or task.done()):
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(given_up())
    assert rows_in_use(text_model) == 0
    assert text_model.engine.stats().cancelled == cancelled + 1


def test_a_task_that_is_cancelled_while_images_are_decoded(text_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread cannot be stopped; what it hands in afterwards takes no row."""
    slow_steps(text_model, monkeypatch)
    entered, leave = threading.Event(), threading.Event()
    prepare, submit = text_model.prepare, text_model.engine.submit
    tickets: list[Any] = []

    def waiting(*args: Any) -> Any:
        entered.set()
        assert leave.wait(30)
        return prepare(*args)

    def noted(*args: Any, **kwargs: Any) -> Any:
        tickets.append(submit(*args, **kwargs))
        return tickets[-1]

    monkeypatch.setattr(text_model, "prepare", waiting)
    monkeypatch.setattr(text_model.engine, "submit", noted)

    async def given_up() -> None:
        task = asyncio.create_task(text_model.agenerate(["Hello", "Goodbye"], beams=1, max_new_tokens=60))
        assert await asyncio.to_thread(entered.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        leave.set()

    asyncio.run(given_up())  # which waits for the thread
    assert len(tickets) == 2
    for ticket in tickets:
        with pytest.raises(CancelledError):
            ticket.result(30)


def test_events_of_a_ticket(text_model: Model) -> None:
    """Tokens as they become certain, from a thread and from a coroutine, are those of the result."""
    prepared = text_model.prepare(Request(prompt="Hello there"))
    for settings in ({"beams": 1}, {"beams": 3}, {"temperature": 1.0, "seed": 5, "num_return": 3}):
        options = GenerateOptions(max_new_tokens=9, **settings)

        async def read(options: GenerateOptions = options) -> tuple[list[Tokens], Outcome]:
            ticket = text_model.engine.submit(prepared, options, events=True)
            return [event async for event in ticket], await ticket

        ticket = text_model.engine.submit(prepared, options, events=True)
        for events, outcome in ((list(ticket), ticket.result()), asyncio.run(read())):
            texts: dict[int, tuple[list[int], list[float]]] = {}
            for event in events:
                ids, logprobs = texts.setdefault(event.index, ([], []))
                ids += event.token_ids
                logprobs += event.token_logprobs
            found = {(tuple(ids), tuple(logprobs)) for ids, logprobs in texts.values()}
            wanted = outcome.hypotheses if "temperature" in settings else outcome.hypotheses[:1]
            assert found == {(text.token_ids, text.token_logprobs) for text in wanted}


def test_stop_texts_are_cut_from_text_and_stream(text_model: Model) -> None:
    whole = text_model.generate("Hello", beams=1, max_new_tokens=16).text
    stop = whole[3:5]
    found = text_model.generate("Hello", beams=1, max_new_tokens=16, stop=stop, top_logprobs=2)
    assert (found.text, found.finished) == (whole[: whole.find(stop)].rstrip(), True)
    assert len(found.top_logprobs) == len(found.token_ids)
    stream = text_model.stream("Hello", beams=1, max_new_tokens=16, stop=[stop, "never there"])
    assert "".join(stream).rstrip() == found.text


def test_as_many_rows_as_fit_in_memory(text_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, slots = text_model.config.language_model, text_model.manifest.limits.max_length
    row = 2 * 4 * lm.num_layers * lm.kv_heads * lm.head_size * slots
    weights = opened_weights(WeightIndex.read(text_model.bundle))
    for room, rows in ((1000 * row, 16), (5 * row + 1, 5), (row - 1, 1)):
        monkeypatch.setattr("flamingo_export.machine.available_memory", lambda room=room: weights + room)
        with flamingo_export.load(text_model.bundle, threads=1) as model:
            assert model.engine.rows == rows
    with pytest.raises(BackendError, match=r"3 rows of 256 cache slots take .* there is room for 1\. Ask for fewer \(--rows\)"):
        flamingo_export.load(text_model.bundle, threads=1, rows=3)


def test_samples_are_a_function_of_seed_and_branch(text_model: Model) -> None:
    """More samples are further ones: the first two stay what they are."""
    texts = []
    for count in (2, 4):
        options = GenerateOptions(temperature=1.3, seed=11, num_return=count, max_new_tokens=8)
        ticket = text_model.engine.submit(text_model.prepare(Request(prompt="Hello")), options)
        texts.append({text.branch: text.token_ids for text in ticket.result().hypotheses})
    assert {branch: texts[1][branch] for branch in (0, 1)} == texts[0]


def test_deadlines_and_a_full_queue(text_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(text_model, monkeypatch)
    with pytest.raises(DeadlineExceeded, match="not finished by its deadline"):
        text_model.generate("Hello", beams=1, max_new_tokens=60, timeout=0.05)
    with flamingo_export.load(text_model.bundle, threads=1) as model:
        slow_steps(model, monkeypatch)
        check_a_full_queue(model, Engine(model.engines, model.config, model.manifest.limits, rows=1, queue=2))


def check_a_full_queue(text_model: Model, engine: Engine) -> None:
    prepared, options = text_model.prepare(Request(prompt="Hello")), GenerateOptions(beams=1, max_new_tokens=30)
    tickets = [engine.submit(prepared, options) for _ in range(3)]
    while not (engine.stats().running or tickets[0].done):
        time.sleep(0.001)
    with pytest.raises(QueueFull, match="2 requests wait already, and no more than 2 are kept"):
        engine.submit(prepared, options)
    assert engine.stats().refused == 1
    with pytest.raises(TimeoutError):
        tickets[-1].result(timeout=0.01)
    tickets[1].cancel()
    with pytest.raises(CancelledError):
        tickets[1].result()
    first, last = (ticket.result().hypotheses[0].token_ids for ticket in (tickets[0], tickets[2]))
    assert first == last
    engine.submit(prepared, options)
    engine.close()
    assert engine.stats().failed == 1
    with pytest.raises(EngineClosed, match="the model is closed"):
        engine.submit(prepared, options)


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
def test_prompts_that_do_not_fit(text_model: Model, prompt: Any, count: int, message: str) -> None:
    call: Any
    for call in (text_model.generate, text_model.stream):
        with pytest.raises(PromptError, match=message):
            call(prompt, images=pictures(3, count))


def test_media_that_do_not_fit(text_model: Model, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        text_model.generate("<image>", images=[tmp_path / "none.png"])
    with pytest.raises(InputError, match=r"images and videos are lists: images=\['a.png'\]"):
        text_model.generate("<image>", images="a.png")
    single: Any
    for single in (b"bytes of a file", io.BytesIO(b"the same")):
        with pytest.raises(InputError, match="images and videos are lists"):
            text_model.generate("<image>", images=single)
    with pytest.raises(InputError, match="are lists"):
        text_model.generate("<image>", images=pictures(0, 1)[0])
    with pytest.raises(InputError, match="a Request carries its own media"):
        text_model.generate(Request(prompt="<image>"), images=pictures(0, 1))
    with pytest.raises(InputError, match="give each its media"):
        text_model.generate(cast("Any", ["<image>", "<image>"]), images=pictures(0, 2))
    with pytest.raises(InputError, match="batch_size is 0"):
        text_model.generate(["Hello"], batch_size=0)


def test_a_list_is_answered_in_order(text_model: Model) -> None:
    images = pictures(4, 2)
    requests: list[Request | str] = [Request(prompt="<image>Output:", media=[image]) for image in images]
    requests.append("Hello there")
    found = text_model.generate(requests, beams=1, max_new_tokens=4)
    assert [one.token_ids for one in found] == [
        text_model.generate(request, beams=1, max_new_tokens=4).token_ids for request in requests
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
        getattr(flamingo_export, "nonsense")  # noqa: B009


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
