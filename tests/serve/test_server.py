"""The server through HTTP: its answers to a chat are those of the model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import flamingo_export

from .conftest import ROOT, Client, data_url, image_part, user

QUESTION = "What colour is the square?"
EXAMPLES = ROOT / "examples"


def test_a_caption(client: Client, nano: flamingo_export.Model) -> None:
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1)
    found = client.chat(messages=user(image_part())).json
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert found["object"] == "chat.completion"
    assert found["usage"]["completion_tokens"] == len(wanted.token_ids)
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]


def test_a_question_with_beams_and_log_probabilities(client: Client, nano: flamingo_export.Model) -> None:
    prompt = f"<image>Question: {QUESTION} Answer:"
    wanted = nano.generate(prompt, images=[EXAMPLES / "q.png"], beams=3, num_return=3)
    found = client.chat(messages=user(image_part("q.png"), QUESTION), beams=3, n=3, logprobs=True).json
    assert [choice["message"]["content"] for choice in found["choices"]] == [
        wanted.text,
        *(other.text for other in wanted.alternatives),
    ]
    values = [token["logprob"] for token in found["choices"][0]["logprobs"]["content"]]
    assert values == pytest.approx(wanted.token_logprobs, abs=1e-4)
    assert [other["text"] for other in found["flamingo"]["alternatives"]] == [other.text for other in wanted.alternatives]


def test_shots_and_turns_are_the_same_prompt(client: Client, nano: flamingo_export.Model) -> None:
    shot = {"image": data_url(EXAMPLES / "a.png"), "caption": "a purple square"}
    by_shots = client.chat(messages=user(image_part("q.png")), shots=[shot])
    turns = [*user(image_part()), {"role": "assistant", "content": "a purple square"}, *user(image_part("q.png"))]
    by_turns = client.chat(messages=turns)
    wanted = nano.generate(
        "<image>Output: a purple square<EOC><image>Output:", images=[EXAMPLES / "a.png", EXAMPLES / "q.png"], beams=1
    )
    texts = [answer.json["choices"][0]["message"]["content"] for answer in (by_shots, by_turns)]
    assert texts == [wanted.text] * 2
    assert (by_shots.json["flamingo"]["phi"], by_shots.json["flamingo"]["looked_at"]) == (2, [2])


@pytest.mark.parametrize("settings", [{}, {"beams": 3}])
def test_stop_texts(client: Client, nano: flamingo_export.Model, settings: dict[str, int]) -> None:
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=settings.get("beams", 1), stop=["triang"])
    whole = client.chat(messages=user(image_part()), stop="triang", **settings).json["choices"][0]
    assert whole["message"]["content"] == wanted.text == "two green"
    assert whole["finish_reason"] == "stop"
    events = client.chat(messages=user(image_part()), stop=["triang"], stream=True, **settings).events[:-1]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == wanted.text


def test_the_likeliest_tokens_at_each_place(client: Client, nano: flamingo_export.Model) -> None:
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1, top_logprobs=3)
    body = {"messages": user(image_part()), "logprobs": True, "top_logprobs": 3}
    whole = client.chat(**body).json["choices"][0]["logprobs"]["content"]
    found = [[other["logprob"] for other in token["top_logprobs"]] for token in whole]
    for values, place in zip(found, wanted.top_logprobs, strict=True):
        assert values == pytest.approx([value for _, value in place], abs=1e-4)
    events = client.chat(**body, stream=True).events[:-1]
    streamed = [token for event in events for token in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [token["top_logprobs"] for token in streamed] == [token["top_logprobs"] for token in whole]
    raw = {"model": "nano", "prompt": "<image>Output:", "images": [data_url(EXAMPLES / "a.png")], "logprobs": 2}
    places = client.post("/v1/completions", raw).json["choices"][0]["logprobs"]["top_logprobs"]
    assert [max(place.values()) for place in places] == pytest.approx([place[0][1] for place in wanted.top_logprobs], abs=1e-4)
    assert client.chat(messages=user(image_part()), top_logprobs=2).status == 400


def test_search_options_reach_the_search(client: Client, nano: flamingo_export.Model) -> None:
    token = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1).token_ids[0]
    settings = {"min_tokens": 8, "repetition_penalty": 1.3, "no_repeat_ngram": 2}
    own: dict[str, Any] = {"min_new_tokens": 8, "repetition_penalty": 1.3, "no_repeat_ngram": 2}
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1, logit_bias={token: -100.0}, **own)
    found = client.chat(messages=user(image_part()), logit_bias={str(token): -100}, **settings).json["choices"][0]
    assert found["message"]["content"] == wanted.text
    assert client.chat(messages=user(image_part()), logit_bias={"red": 1}).status == 400


def test_a_seed_gives_the_same_draws(client: Client) -> None:
    def draw(seed: int) -> list[str]:
        found = client.chat(messages=user(image_part()), temperature=1.5, n=4, seed=seed).json
        return [choice["message"]["content"] for choice in found["choices"]]

    assert draw(1) == draw(1)
    assert any(draw(1) != draw(seed) for seed in (2, 3, 4))


def test_temperature_zero_is_greedy_whatever_the_seed(client: Client) -> None:
    plain, zero = (
        client.chat(messages=user(image_part()), **more).json for more in ({}, {"temperature": 0, "seed": 3, "top_p": 1})
    )
    assert plain["choices"] == zero["choices"]


def test_many_callers_get_what_one_gets(client: Client) -> None:
    names = [f"images/scene_{number}.png" for number in range(1, 9)]
    alone = {name: client.chat(messages=user(image_part(name))).json["choices"] for name in names}
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: (name, client.chat(messages=user(image_part(name))).json["choices"]), names * 4))
    for name, choices in found:
        assert choices == alone[name]
