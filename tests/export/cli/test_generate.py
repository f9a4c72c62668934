"""generate and score: the line becomes the request that it should, and what is printed is what the library returns."""

from __future__ import annotations

import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

import flamingo_export
from flamingo_export import Request, Video
from flamingo_export.cli.app import app
from flamingo_export.runtime.options import GenerateOptions


@pytest.fixture(scope="module")
def model(bundle):
    with flamingo_export.load(bundle) as opened:
        yield opened


@pytest.fixture
def shots(pictures):
    path = pictures / "shots.jsonl"
    lines = [
        {"image": "b.png", "question": "What is it?", "answer": "noise"},
        {"image": "c.png", "question": "Which?", "answer": "c"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_a_caption_is_the_default(cli, bundle, pictures, model):
    outcome = cli("generate", bundle, "--image", pictures / "a.png", "--max-new-tokens", 6)
    expected = model.generate("<BOS><image>Output:", images=[pictures / "a.png"], max_new_tokens=6)
    assert (outcome.code, outcome.out) == (0, expected.text + "\n")


def test_a_question_after_shots(cli, bundle, pictures, shots):
    line = [
        "generate",
        bundle,
        "--image",
        pictures / "a.png",
        "--shots",
        shots,
        "--question",
        "What now?",
        "--max-new-tokens",
        4,
    ]
    data = json.loads(cli(*line, "--json").out)
    assert data["prompt"] == (
        "<BOS><image>Question: What is it? Answer: noise<EOC><image>Question: Which? Answer: c<EOC><image>Question: What now? Answer:"
    )
    assert data["timings"]["media_encoded"] == 3
    text_only = json.loads(cli(*line, "--json", "--text-only").out)
    assert text_only["prompt"].count("<image>") == 1
    assert text_only["timings"]["media_encoded"] == 1


def test_json_has_the_token_probabilities(cli, bundle, pictures, model):
    outcome = cli(
        "generate", bundle, "--image", pictures / "a.png", "--beams", 4, "--num-return", 3, "--max-new-tokens", 5, "--json"
    )
    texts = json.loads(outcome.out)["texts"]
    assert len(texts) == 3
    assert [text["score"] for text in texts] == sorted((text["score"] for text in texts), reverse=True)
    for text in texts:
        assert np.sum(text["token_logprobs"]) == pytest.approx(text["score"], rel=1e-9)
        prompt = [*model.tokenizer.encode("<BOS><image>Output:")]
        again = model.score(prompt, [text["token_ids"]], images=[pictures / "a.png"])[0]
        assert again.token_logprobs == pytest.approx(text["token_logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    "options", [["--beams", 1], ["--beams", 3], ["--temperature", 1.5, "--seed", 7], ["--top-k", 5, "--seed", 1]]
)
def test_streaming_prints_the_same_text(cli, bundle, pictures, options):
    line = ["generate", bundle, "--image", pictures / "a.png", "--max-new-tokens", 8, *options]
    assert cli(*line, "--stream").out.strip() == cli(*line).out.strip()


def test_media_go_to_their_tags_as_typed(cli, bundle, pictures, model):
    prompt = "<image>one<image>two<image>three"
    image, other, clip = pictures / "a.png", pictures / "b.png", pictures / "clip.gif"
    outcome = cli(
        "generate",
        bundle,
        f"--image={image}",
        "--video",
        clip,
        "-i",
        other,
        "--prompt",
        prompt,
        "--max-new-tokens",
        3,
        "--json",
    )
    token_logprobs = json.loads(outcome.out)["texts"][0]["token_logprobs"]

    def asked(*media):
        return pytest.approx(
            list(model.generate(Request(prompt=prompt, media=media), max_new_tokens=3).token_logprobs), abs=1e-6
        )

    assert token_logprobs == asked(image, Video(source=clip), other)
    assert token_logprobs != asked(image, other, Video(source=clip))


def test_frames_of_a_video(cli, bundle, pictures, model):
    line = ["generate", bundle, "--video", pictures / "clip.gif", "--num-frames", 2, "--max-new-tokens", 3]
    expected = model.generate(
        "<BOS><image>Output:", videos=[Video(source=pictures / "clip.gif", num_frames=2)], max_new_tokens=3
    )
    assert json.loads(cli(*line, "--json").out)["texts"][0]["token_ids"] == list(expected.token_ids)


@pytest.mark.parametrize(("option", "name"), [("--image", "a.png"), ("-i", "a.png"), ("--video", "clip.gif")])
def test_standard_input(cli, bundle, pictures, monkeypatch, option, name):
    expected = json.loads(cli("generate", bundle, option, pictures / name, "--max-new-tokens", 3, "--json").out)["texts"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((pictures / name).read_bytes())))
    assert json.loads(cli("generate", bundle, option, "-", "--max-new-tokens", 3, "--json").out)["texts"] == expected


def test_standard_input_once_and_only_where_something_is_piped(cli, bundle, pictures, monkeypatch):
    twice = cli("generate", bundle, "--image", "-", "--video", "-", "--prompt", "<image><image>")
    assert twice.code == 2
    assert "standard input (-) can be read once" in " ".join(twice.err.split())
    monkeypatch.setattr("sys.stdin", None)
    assert cli("generate", bundle, "--image", "-").code == 2
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    empty = cli("generate", bundle, "--image", "-")
    assert (empty.code, "is empty: it has no bytes" in empty.err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "https://example.org/a.png"], "https://example.org/a.png is a URL, and URLs are not fetched"),
        (["--video", "http://example.org/a.gif"], "http://example.org/a.gif is a URL, and URLs are not fetched"),
        (["--prompt", "<image><image>Output:", "--image", "a.png"], "2 <image> tags"),
        (["--prompt", "Output:", "--image", "a.png"], "0 <image> tags"),
        (["--prompt", " "], "empty"),
        (["--image", "missing.png"], "does not exist"),
        (["--image", "clip.gif"], "--video"),
        (["--image", "text.png"], "not an image"),
        (["--image", "a.png", "--shots", "none.jsonl"], "does not exist"),
        (["--image", "a.png", "--max-new-tokens", "100000"], "cache slots"),
        (["--image", "a.png", "--backend", "abacus"], "no backend"),
        (["--image", "a.png", "--device", "cuda"], "cuda"),
    ],
)
def test_what_cannot_be_done_is_one_line_on_stderr(cli, bundle, pictures, monkeypatch, arguments, words):
    monkeypatch.chdir(pictures)
    Path("text.png").write_text("no image")
    outcome = cli("generate", bundle, *arguments)
    assert outcome.code == 1
    assert outcome.out == ""
    assert words.lower() in outcome.err.lower()
    assert outcome.err.count("\n") == 1


def test_candidates_may_be_given_one_by_one(cli, bundle, pictures):
    """The last ones alone were ranked."""
    line = ["score", bundle, "--image", pictures / "a.png", "--prompt", "<image>It is", "--json"]
    together, apart = cli(*line, "--candidates", "red,green,blue"), cli(*line, "--candidates", "red", "-c", "green,blue")
    assert len(json.loads(together.out)["scores"]) == 3
    assert json.loads(apart.out) == json.loads(together.out)
    assert cli(*line, "-c", "red", "-c", "").code == 2


def test_candidates_are_ranked(cli, bundle, pictures, model):
    line = ["score", bundle, "--image", pictures / "a.png", "--prompt", "<image>It is", "--candidates", "red, green,a long one"]
    ranked = json.loads(cli(*line, "--json").out)["scores"]
    expected = model.score("<image>It is", ["red", "green", "a long one"], images=[pictures / "a.png"])
    assert {each["candidate"]: each["logprob"] for each in ranked} == {
        each.candidate: pytest.approx(each.logprob, abs=1e-4) for each in expected
    }
    written = model.score("<image>It is", ["red<EOC>", "green<EOC>", "a long one<EOC>"], images=[pictures / "a.png"], end=False)
    assert [each.logprob for each in written] == pytest.approx([each.logprob for each in expected], abs=1e-4)
    assert [each["logprob"] for each in ranked] == sorted((each["logprob"] for each in ranked), reverse=True)
    rows = cli(*line).out.splitlines()
    assert ranked[0]["candidate"] in rows[3]
    open_ended = json.loads(cli(*line, "--open", "--json").out)["scores"]
    by_name = {each["candidate"]: each["logprob"] for each in ranked}
    assert all(each["logprob"] > by_name[each["candidate"]] for each in open_ended)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length-penalty", "1000"], "--length-penalty is 1000"),
        (["--temperature", "inf"], "--temperature is inf"),
        (["--top-p", "0"], "--top-p is 0"),
        (["--num-return", "5", "--beams", "3"], "--num-return 5 needs at least 5 beams, --beams is 3"),
        (["--seed", "7"], "--seed is 7, but nothing is drawn: add --temperature, --top-k or --top-p"),
        (["--top-k", "7", "--beams", "3"], "3 beams and sampling"),
        (["--temperature", "0", "--top-k", "7"], "--top-k is 7, and --temperature 0 takes the likeliest token"),
        (["--temperature", "0", "--beams", "3"], "--temperature 0 is greedy, and --beams is 3"),
        (["--num-frames", "4"], "there is no --video"),
        (["--text-only"], "--text-only needs --shots"),
        (["--min-p", "0.1", "--beams", "3"], "3 beams and sampling"),
        (["--early-stopping", "--beams", "1"], "--early-stopping was asked for, but there are no beams"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0, expected more than 0"),
        (["--min-new-tokens", "9", "--max-new-tokens", "4"], "--min-new-tokens is 9, --max-new-tokens only 4"),
        (["--stop", ""], "--stop is"),
        (["--logit-bias", "17"], "'17' is not a token id and a bias"),
        (["--logit-bias", "17=1", "--logit-bias", "17=2"], "token 17 has two biases"),
        (["--logit-bias", "17=1e9"], "--logit-bias has a bias outside"),
        (["--top-logprobs", "2"], "printed with --json"),
        (["--top-logprobs", "99", "--json"], "--top-logprobs is 99"),
    ],
)
def test_settings_that_cannot_be_are_usage_errors(cli, bundle, pictures, options, words):
    outcome = cli("generate", bundle, "--image", pictures / "a.png", *options)
    assert outcome.code == 2
    assert words in outcome.err


def test_a_clip_is_start_and_end(cli, bundle, pictures):
    outcome = cli("generate", bundle, "--video", pictures / "clip.gif", "--clip", "3", "--prompt", "<image>Output:")
    assert outcome.code == 2
    assert "expected seconds as START-END" in outcome.err
    outcome = cli(
        "generate",
        bundle,
        "--video",
        pictures / "clip.gif",
        "--clip",
        "0.1-0.3",
        "--fps",
        "10",
        "-p",
        "<image>Output:",
        "--json",
        "--max-new-tokens",
        "1",
    )
    assert outcome.code == 0, outcome.err
    outcome = cli("generate", bundle, "--video", pictures / "clip.gif", "--clip", "3-4", "-p", "<image>Output:")
    assert outcome.code == 1
    assert "the clip begins at 3 s" in outcome.err


def test_names_of_the_last_release_keep_working_and_say_so(cli, bundle, pictures):
    line = ["generate", bundle, "--image", pictures / "a.png", "--beams", 4, "--max-new-tokens", 3]
    now = cli(*line, "--num-return", 2)
    for old in (["--n-best", 2], ["--n-best=2"]):
        outcome = cli(*line, *old)
        assert (outcome.code, outcome.out) == (0, now.out)
        assert "--n-best is called --num-return now" in outcome.err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--num-beams", "it is called --beams here"),
        ("--max_tokens", "it is called --max-new-tokens here"),
        ("--num-return-sequences", "it is called --num-return here"),
        ("--max-length", "--max-new-tokens counts the new tokens"),
        ("--temprature", "--temperature"),
    ],
)
def test_options_of_other_libraries_lead_to_ours(cli, bundle, option, words):
    outcome = cli("generate", bundle, option, "3")
    assert outcome.code == 2
    assert words in outcome.err


def test_every_setting_has_an_option_of_its_name():
    command: Any = get_command(app)
    options = {option for parameter in command.commands["generate"].params for option in parameter.opts}
    assert {f"--{field.name.replace('_', '-')}" for field in fields(GenerateOptions)} <= options


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--beams", "1", "--stop", "e", "--stop", "zz"], {"beams": 1, "stop": ["e", "zz"]}),
        (["--beams", "1", "--repetition-penalty", "4"], {"beams": 1, "repetition_penalty": 4.0}),
        (["--beams", "2", "--no-repeat-ngram", "1"], {"beams": 2, "no_repeat_ngram": 1}),
        (
            ["--beams", "2", "--early-stopping", "--max-new-tokens", "6"],
            {"beams": 2, "early_stopping": True, "max_new_tokens": 6},
        ),
        (["--beams", "1", "--min-new-tokens", "9"], {"beams": 1, "min_new_tokens": 9}),
        (["--min-p", "0.05", "--temperature", "2", "--seed", "3"], {"min_p": 0.05, "temperature": 2.0, "seed": 3}),
        (
            ["--beams", "1", "--logit-bias", "40=30", "--max-new-tokens", "3"],
            {"beams": 1, "logit_bias": {40: 30.0}, "max_new_tokens": 3},
        ),
        (["--beams", "1", "--top-logprobs", "3"], {"beams": 1, "top_logprobs": 3}),
    ],
)
def test_search_options_are_those_of_python(cli, bundle, pictures, model, options, settings):
    line = ["generate", bundle, "--image", pictures / "a.png", "--prompt", "<image>Output:", "--json"]
    (text,) = json.loads(cli(*line, *options).out)["texts"]
    wanted = model.generate("<image>Output:", images=[pictures / "a.png"], **settings)
    assert (text["text"], tuple(text["token_ids"])) == (wanted.text, wanted.token_ids)
    if "top_logprobs" in settings:
        assert [[token for token, _ in place] for place in text["top_logprobs"]] == [
            [token for token, _ in place] for place in wanted.top_logprobs
        ]


def test_answers_of_a_given_form(cli, bundle, pictures, tmp_path):
    pytest.importorskip("llguidance", reason="the extra `constraints`")
    line = ["generate", bundle, "--image", pictures / "a.png", "--prompt", "<image>Output:", "--beams", "1"]
    assert cli(*line, "--choice", "a red one", "--choice", "green").out.strip() in ("a red one", "green")
    assert cli(*line, "--regex", "[0-9]{3}").out.strip().isdigit()
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}))
    assert set(json.loads(cli(*line, "--json-schema", schema).out)) <= {1, 2}
    for text, said in (("[", "is not JSON"), ("[]", "holds list, expected an object")):
        schema.write_text(text)
        outcome = cli(*line, "--json-schema", schema)
        assert (outcome.code, said in outcome.err) == (2, True)
    assert "cannot be read" in cli(*line, "--json-schema", tmp_path / "none.json").err
    assert "only one of --json-schema, --regex and --choice" in cli(*line, "--regex", "a", "--choice", "a").err
