"""A tuned Llama 3.2 Vision as a user has it: the published folder with tokenizer and chat template, built, asked, streamed and served."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_chat import BOS, END, EOM, EOT, IMAGE, REFUSING_TEMPLATE, TEMPLATE, special_tokens, write_tokenizer
from llama_models import corrected, their_config, their_model
from PIL import Image

import flamingo_export
from flamingo_export import CheckpointError, ImageError, InputError, Model, PromptError, chat_prompt

ROWS = 300
IDS = special_tokens(ROWS)
STOPS = [IDS[EOT], IDS[END], IDS[EOM]]
SIDE = 28
LENGTH = 12


def written(folder: Path, *, template: str | None = TEMPLATE, template_file: str = "chat_template.jinja") -> tuple[Path, Any]:
    """A folder as on the hub, and the model that it holds."""
    config: Any = their_config()
    config.image_token_index = IDS[IMAGE]
    config.text_config.vocab_size, config.text_config.max_position_embeddings = ROWS, 1024
    config.text_config.bos_token_id, config.text_config.eos_token_id = IDS[BOS], STOPS
    theirs = their_model(config, seed=5).float()
    theirs.generation_config.eos_token_id, theirs.generation_config.bos_token_id = STOPS, IDS[BOS]
    theirs.save_pretrained(folder, max_shard_size="400KB")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize"), True),
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "image_processor_type": "MllamaImageProcessor",
                "max_image_tiles": 4,
                "resample": 2,
                "rescale_factor": 1 / 255,
                "size": {"height": SIDE, "width": SIDE},
            }
        )
    )
    write_tokenizer(folder, ROWS, template=template, template_file=template_file)
    return folder, theirs


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return written(tmp_path_factory.mktemp("hub") / "tiny-vision-instruct")


@pytest.fixture(scope="module")
def bundle(llama: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "llama.bundle"
    return flamingo_export.build(llama[0], out=out, parity="skip").path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with flamingo_export.load(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def processor(llama: tuple[Path, Any]) -> Any:
    from transformers import AutoTokenizer, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(llama[0])
    images = MllamaImageProcessorPil.from_pretrained(llama[0])
    return MllamaProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


ONE, WIDE, TALL, FOUR = picture(20, 25, 1), picture(70, 20, 2), picture(20, 60, 3), picture(50, 52, 4)


def image() -> dict[str, str]:
    return {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Image.Image]]] = {
    "one tile": ([{"role": "user", "content": [image(), text("What is this?")]}], [ONE]),
    "three tiles": ([{"role": "user", "content": [image(), text("What is this?")]}], [WIDE]),
    "text first": ([{"role": "user", "content": [text("What is this?"), image()]}], [FOUR]),
    "adjacent images": ([{"role": "user", "content": [image(), image(), text("Which?")]}], [TALL, ONE]),
    "text only": ([{"role": "user", "content": "Why?"}], []),
    "system, two turns, three images": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [image(), text("What is this?")]},
            {"role": "assistant", "content": "A bird."},
            {"role": "user", "content": [image(), text("and"), image(), text("Which?")]},
        ],
        [FOUR, WIDE, ONE],
    ),
}


def theirs_say(theirs: Any, processor: Any, messages: list[dict[str, Any]], images: list[Image.Image], beams: int) -> list[int]:
    """Tokens of transformers' own processor and search, its model corrected as Meta's code is."""
    written = processor.apply_chat_template(messages, add_generation_prompt=True, date="26 Jul 2024")
    inputs = processor(images or None, written, add_special_tokens=False, return_tensors="pt")
    with corrected(theirs), torch.no_grad():
        out = theirs.generate(
            **inputs, do_sample=False, num_beams=beams, length_penalty=0.0, early_stopping=False, max_new_tokens=LENGTH
        )
    said = out[0, inputs["input_ids"].shape[1] :].tolist()
    end = next((place + 1 for place, token in enumerate(said) if token in STOPS), len(said))
    return said[:end]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_answered_as_by_transformers(name: str, beams: int, model: Model, llama: Any, processor: Any) -> None:
    messages, images = CONVERSATIONS[name]
    found = model.chat(messages, images=images, beams=beams, max_new_tokens=LENGTH)
    assert list(found.token_ids) == theirs_say(llama[1], processor, messages, images, beams)


def test_the_answer_depends_on_every_image(model: Model) -> None:
    """Or the comparison above would say nothing about images."""
    messages, images = CONVERSATIONS["adjacent images"]
    usual = model.chat(messages, images=images, beams=1, max_new_tokens=2)
    for others in ([ONE, TALL], [TALL, WIDE], [FOUR, ONE]):
        assert model.chat(messages, images=others, beams=1, max_new_tokens=2).token_logprobs[0] != pytest.approx(
            usual.token_logprobs[0], abs=1e-3
        )


def test_the_bundle_knows_its_template_and_ends(bundle: Path, model: Model) -> None:
    assert model.inputs.prompts.template == TEMPLATE
    assert (bundle / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert set(model.config.tokens.stops) == set(STOPS)
    assert model.config.tokens.eoc == IDS[EOT]


def test_asking_is_a_conversation(model: Model) -> None:
    asked = model.ask(FOUR, "What is this?", system="Be brief.", beams=1, max_new_tokens=LENGTH)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image(), text("What is this?")]}]
    assert asked.token_ids == model.chat(messages, images=[FOUR], beams=1, max_new_tokens=LENGTH).token_ids  # type: ignore[arg-type]
    with model.stream(chat_prompt(messages, [FOUR], inputs=model.inputs), beams=1, max_new_tokens=LENGTH) as stream:  # type: ignore[arg-type]
        pieces = "".join(stream)
    assert pieces == asked.text
    assert stream.result is not None
    assert stream.result.token_ids == asked.token_ids


def test_an_image_is_encoded_once_whoever_asks(model: Model) -> None:
    picture_of_four = picture(55, 51, 9)
    assert model.ask(picture_of_four, "One?", max_new_tokens=2).timings.media_reused == 0
    again = model.chat([{"role": "user", "content": [text("Two?"), image()]}], images=[picture_of_four], max_new_tokens=2)
    assert again.timings.media_reused == 1


def test_candidates_are_scored_behind_the_open_turn(model: Model, llama: Any, processor: Any) -> None:
    messages, images = CONVERSATIONS["one tile"]
    (score,) = model.score(chat_prompt(messages, images, inputs=model.inputs), ["A bird."])
    written = processor.apply_chat_template(messages, add_generation_prompt=True, date="26 Jul 2024")
    inputs = processor(images, written + "A bird." + EOT, add_special_tokens=False, return_tensors="pt")
    with corrected(llama[1]), torch.no_grad():
        logprobs = torch.log_softmax(llama[1](**inputs).logits[0].double(), -1)
    ids = inputs["input_ids"][0]
    count = len(score.token_logprobs)
    expected = [float(logprobs[place - 1, ids[place]]) for place in range(len(ids) - count, len(ids))]
    np.testing.assert_allclose(score.token_logprobs, expected, atol=1e-4)


def test_an_index_averages_the_tiles_that_show_something(model: Model, llama: Any, processor: Any) -> None:
    """Beside transformers' vision transformer, whose features are the same numbers in another order."""
    from flamingo_export.evaluation.bundles import BundleModel

    found = BundleModel(model).features([ONE, WIDE, FOUR])
    for vector, picture in zip(found, [ONE, WIDE, FOUR], strict=True):
        inputs = processor.image_processor(picture, return_tensors="pt")
        count = int(inputs.pop("num_tiles")[0][0])
        with corrected(llama[1]), torch.no_grad():
            theirs = llama[1].model.vision_model(**inputs).last_hidden_state.reshape(4, -1, found.shape[1])
        expected = theirs[:count].mean(dim=(0, 1)).numpy()
        np.testing.assert_allclose(np.sort(vector), np.sort(expected), atol=1e-4)


def test_no_option_reads_a_logit_of_the_image_token(model: Model) -> None:
    """It has none: its id is the number of the output's rows. Penalties count what is around it, and top_logprobs never names it."""
    assert IDS[IMAGE] == ROWS == model.config.language_model.vocab_size
    prompt = [IDS[BOS], IDS[IMAGE], 70, IDS[IMAGE], 70]
    options: dict[str, Any] = {"max_new_tokens": 4, "top_logprobs": 20}
    for search in ({"beams": 1}, {"beams": 3}, {"temperature": 1.0, "seed": 0}):
        found = model.generate(prompt, images=[ONE, WIDE], repetition_penalty=1.3, no_repeat_ngram=1, **search, **options)
        assert 70 not in found.token_ids  # once is once too often, which the prompt has
        assert max(token for likeliest in found.top_logprobs for token, _ in likeliest) < ROWS
        assert max(found.token_ids) < ROWS
    # What follows 70 in the prompt is an image, which cannot follow: two in a row forbid nothing here.
    plain = model.generate(prompt, images=[ONE, WIDE], beams=1, max_new_tokens=1)
    assert model.generate(prompt, images=[ONE, WIDE], beams=1, max_new_tokens=1, no_repeat_ngram=2).token_ids == plain.token_ids
    with pytest.raises(InputError, match=f"logit_bias names token {ROWS}, the model knows 0 to {ROWS - 1}"):
        model.generate(prompt, images=[ONE, WIDE], logit_bias={IDS[IMAGE]: 1.0})
    with pytest.raises(InputError, match=f"some outside 0 to {ROWS - 1}"):
        model.score(flamingo_export.Request(prompt=prompt, media=[ONE, WIDE]), [[70, IDS[IMAGE]]])


def test_evaluation_counts_tiles_before_any_work(model: Model, tmp_path: Path) -> None:
    """A shot of four tiles takes four rows of the bank; a picture that is shown twice takes them once."""
    from flamingo_export import Shot, qa_prompt
    from flamingo_export.evaluation.bundles import BundleModel

    evaluated, bank = BundleModel(model), model.manifest.limits.bank_rows
    paths = [tmp_path / f"{number}.png" for number in range(bank // 4 + 1)]
    for path in paths:
        FOUR.save(path)
    ONE.save(tmp_path / "one.png")

    def check(*shown: Path) -> None:
        shots = [Shot(answer="A.", question="Q?", medium=path) for path in shown[:-1]]
        evaluated.check([qa_prompt(shots, "Q?", shown[-1], model.inputs)], beams=1, max_new_tokens=2)

    check(*paths[:-1])
    check(*paths[:-1], paths[0])
    for last, rows in ((paths[-1], bank + 4), (tmp_path / "one.png", bank + 1)):
        with pytest.raises(
            InputError, match=f"shows {len(paths)} images of {rows} tiles, the bundle's media bank holds {bank}"
        ):
            check(*paths[:-1], last)


def test_tiles_are_known_from_the_size_of_an_image(model: Model, tmp_path: Path) -> None:
    from flamingo_export.runtime.media import load_medium, rows_of

    turned = Image.Exif()
    turned[0x0112] = 6
    for number, shown in enumerate((ONE, WIDE, TALL, FOUR)):
        WIDE.save(tmp_path / "turned.png", exif=turned)
        shown.save(tmp_path / f"{number}.png")
        for source in (shown, np.asarray(shown), tmp_path / f"{number}.png", tmp_path / "turned.png"):
            assert rows_of(source, model.config) == load_medium(source, model.config).rows
    with pytest.raises(ImageError):
        rows_of(b"not an image", model.config)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda model: model.ask(ONE, f"What is {IMAGE}?"), PromptError, r"contains the tag <\|image\|>"),
        (lambda model: model.ask(ONE, "a <|start_header_id|>"), PromptError, "token of its own"),
        (lambda model: model.chat([{"role": "user", "content": "a", "tool_calls": [1]}]), PromptError, "tools are not offered"),
        (lambda model: model.chat([{"role": "user", "content": "a"}], tools=[]), InputError, "tools"),
        (lambda model: model.chat([{"role": "user", "content": "a"}], images="a.png"), InputError, "images=\\['a.png'\\]"),
        (lambda model: model.ask(flamingo_export.Video(source="a.mp4"), "a"), ImageError, "takes images only"),
        (lambda model: model.generate("<image>a", images=[ONE]), PromptError, r"0 <\|image\|> tags"),
        (lambda model: model.ask([ONE] * 40, "Which?"), InputError, "tiles|bank|media"),
        (lambda model: model.generate([IDS[BOS], IDS[IMAGE] + 8]), PromptError, "the model knows 0 to 307"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_work(model: Model, call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(model)


@pytest.mark.slow
def test_a_template_that_cannot_ask_about_an_image_is_refused_before_the_build(tmp_path: Path) -> None:
    for number, (template, said) in enumerate(
        [
            ("{% for m in messages %}{{ m.role }}{% endfor %}", "it is not one for images"),
            ("{{ raise_exception('Bring tools.') }}", "refuses this conversation: Bring tools."),
            ("{% for tool in tools %}{% endfor %}", "tools, which are not offered"),
            ("{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(99) %}{% endfor %}{% endfor %}{% endfor %}", "does not end"),
            ("{{ messages.__class__ }}", "stopped: it reads .__class__"),
            ("{% if %}", "cannot be read"),
        ]
    ):  # fmt: skip
        folder, _ = written(tmp_path / f"checkpoint{number}", template=template)
        with pytest.raises(CheckpointError, match=f"chat template cannot be used: .*{said}"):
            flamingo_export.build(folder, out=tmp_path / "x.bundle", parity="skip")
        assert not (tmp_path / "x.bundle").exists()


@pytest.mark.slow
def test_early_templates_refuse_system_messages_beside_images(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "early", template=REFUSING_TEMPLATE, template_file="chat_template.json")
    with flamingo_export.load(flamingo_export.build(folder, out=tmp_path / "e.bundle", parity="skip").path) as model:
        with pytest.raises(PromptError, match=r"No system message may stand before images\."):
            model.ask(ONE, "What?", system="Be brief.")
        assert model.ask(None, "What?", system="Be brief.", max_new_tokens=2).token_ids


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[Any]:
    from starlette.testclient import TestClient

    from flamingo_export.serve.app import Server, create_app
    from flamingo_export.serve.models import Models
    from flamingo_export.serve.settings import ModelChoice, ServeSettings

    models = Models([ModelChoice(name="llama", bundle=bundle)], lambda choice: flamingo_export.load(choice.bundle, threads=1))
    with TestClient(create_app(Server(models, ServeSettings()))) as opened:
        yield opened


def over_http(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    """The messages as OpenAI's clients write them."""
    left = iter(images)

    def part(each: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": data_url(next(left))}} if each["type"] == "image" else each

    return [
        {**each, "content": each["content"] if isinstance(each["content"], str) else [part(p) for p in each["content"]]}
        for each in messages
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_served_conversations_are_the_models(name: str, client: Any, model: Model) -> None:
    messages, images = CONVERSATIONS[name]
    wanted = model.chat(messages, images=images, beams=1, max_new_tokens=LENGTH)
    body = {"model": "llama", "messages": over_http(messages, images), "max_completion_tokens": LENGTH, "logprobs": True}
    found = client.post("/v1/chat/completions", json=body).json()
    (choice,) = found["choices"]
    assert choice["message"]["content"] == wanted.text
    assert choice["finish_reason"] == ("stop" if wanted.finished else "length")
    values = [token["logprob"] for token in choice["logprobs"]["content"]]
    np.testing.assert_allclose(values, wanted.token_logprobs, atol=1e-4)
    assert found["usage"]["completion_tokens"] == len(wanted.token_ids)
    assert found["flamingo"]["phi"] == len(images)


def test_echo_scores_a_prompt_about_images(client: Any, model: Model) -> None:
    (wanted,) = model.score(f"{BOS}{IMAGE}What is{IMAGE}this?", [" A bird."], images=[FOUR, ONE], end=False)
    prompt = f"{BOS}{IMAGE}What is{IMAGE}this? A bird."
    body = {"model": "llama", "prompt": prompt, "images": [data_url(FOUR), data_url(ONE)], "max_tokens": 0, "logprobs": 1}
    found = client.post("/v1/completions", json={**body, "echo": True})
    assert found.status_code == 200
    values = found.json()["choices"][0]["logprobs"]["token_logprobs"]
    count = len(wanted.token_logprobs)
    np.testing.assert_allclose(values[-count:], wanted.token_logprobs, atol=1e-4)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_stream_is_the_answer_in_pieces(name: str, model: Model) -> None:
    """Images of one to four tiles, several of them, side by side, a system message, turns: token by token what is answered as a whole."""
    messages, images = CONVERSATIONS[name]
    whole = model.chat(messages, images=images, beams=1, max_new_tokens=LENGTH)
    prompt = chat_prompt(messages, images, inputs=model.inputs)
    assert model.generate(prompt, beams=1, max_new_tokens=LENGTH).token_ids == whole.token_ids
    with model.stream(prompt, beams=1, max_new_tokens=LENGTH) as stream:
        pieces = list(stream)
    assert stream.result is not None
    assert stream.result.token_ids == whole.token_ids
    assert "".join(pieces) == whole.text
    assert sum(1 for piece in pieces if piece) > 1 or len(whole.text) < 2


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_served_stream(name: str, client: Any, model: Model) -> None:
    messages, images = CONVERSATIONS[name]
    wanted = model.chat(messages, images=images, beams=1, max_new_tokens=LENGTH)
    body = {"model": "llama", "messages": over_http(messages, images), "max_tokens": LENGTH, "stream": True, "logprobs": True}
    lines = [line.removeprefix("data: ") for line in client.post("/v1/chat/completions", json=body).text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == wanted.text
    assert choices[-1]["finish_reason"] == ("stop" if wanted.finished else "length")
    values = [token["logprob"] for choice in choices for token in (choice.get("logprobs") or {"content": []})["content"]]
    np.testing.assert_allclose(values, wanted.token_logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"tools": [{"type": "function"}]}, 400, "tools is not offered"),
        ({"messages": [{"role": "tool", "content": "3"}]}, 400, "no tools"),
        ({"messages": [{"role": "user", "content": f"a {EOT}"}]}, 400, "token of its own"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, 400, "Users and assistants take turns"),
        ({"messages": [{"role": "user", "content": "a"}], "date": "tomorrow"}, 400, "expected a day as YYYY-MM-DD"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "data:,a"}]}]},
            400,
            "takes images only",
        ),
    ],
)
def test_what_a_server_refuses(client: Any, body: dict[str, Any], status: int, said: str) -> None:
    found = client.post("/v1/chat/completions", json={"model": "llama", "messages": [{"role": "user", "content": "a"}], **body})
    assert (found.status_code, said in found.json()["error"]["message"]) == (status, True), found.text


def test_a_prompt_with_tokens_without_a_logit_is_echoed(client: Any) -> None:
    """Of the eight rows behind the head's some stand in the prompt: what follows them is scored."""
    body = {"model": "llama", "prompt": [IDS[BOS], 70, ROWS + 3, 71, 72], "echo": True, "logprobs": 1, "max_tokens": 1}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    values = found.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert [value is None for value in values] == [True, True, True, False, False, False]


def test_the_day_of_a_request(client: Any) -> None:
    messages = [{"role": "user", "content": "a"}]
    bodies = [{"model": "llama", "messages": messages, "max_tokens": 1} | day for day in ({}, {"date": "2031-01-02"})]
    fixed, given = (client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] for body in bodies)
    assert fixed == given  # as many letters: what differs is the day
    assert client.post("/v1/chat/completions", json=bodies[1]).status_code == 200


def test_the_command_line(bundle: Path, model: Model, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from flamingo_export.cli.app import app

    FOUR.save(tmp_path / "a.png")
    ONE.save(tmp_path / "b.png")
    run = CliRunner().invoke

    def texts(*arguments: str) -> dict[str, Any]:
        found = run(app, ["generate", str(bundle), *arguments, "--beams", "1", "--max-new-tokens", str(LENGTH), "--json"])
        assert found.exit_code == 0, found.output
        return dict(json.loads(found.stdout))

    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    wanted = model.ask([FOUR, ONE], "Which?", system="Be brief.", beams=1, max_new_tokens=LENGTH)
    found = texts("--image", a, "--image", b, "--question", "Which?", "--system", "Be brief.")
    assert found["texts"][0]["token_ids"] == list(wanted.token_ids)
    assert "Today Date: 26 Jul 2024" in found["prompt"]
    assert "Today Date: 02 Jan 2031" in texts("--question", "Why?", "--date", "2031-01-02")["prompt"]
    raw = texts("--image", a, "--prompt", f"{IMAGE}A picture of")
    assert raw["texts"][0]["token_ids"] == list(
        model.generate(f"{IMAGE}{BOS}A picture of", images=[FOUR], beams=1, max_new_tokens=LENGTH).token_ids
    )
    for wrong, said in (
        (["--prompt", "a", "--system", "b"], "--system"),
        (["--question", "a", "--date", "soon"], "--date"),
        ([], "--image"),
    ):
        refused = run(app, ["generate", str(bundle), *wrong])
        assert refused.exit_code == 2
        assert said in refused.output
