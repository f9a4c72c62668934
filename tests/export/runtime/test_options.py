"""Settings of a generation: what has no effect is refused, what other libraries call otherwise is named, temperature 0 is greedy."""

from __future__ import annotations

from typing import Any

import pytest

from flamingo_export.errors import InputError
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions, options_from
from flamingo_export.runtime.request import Request
from flamingo_reference.config import ModelConfig

from .conftest import LoadTiny, random_prompt


@pytest.fixture
def model(load_tiny: LoadTiny) -> Model:
    return load_tiny()


def test_temperature_zero_is_greedy(model: Model, tiny_config: ModelConfig) -> None:
    prompts = [random_prompt(tiny_config, seed, 9, 0) for seed in range(6)]
    greedy = [model.generate(prompt, beams=1, max_new_tokens=12).token_ids for prompt in prompts]
    beams = [model.generate(prompt, beams=3, max_new_tokens=12).token_ids for prompt in prompts]
    assert greedy != beams
    for settings in ({"temperature": 0.0}, {"temperature": 0, "beams": 1}, {"temperature": 0.0, "top_p": 1.0}):
        assert [model.generate(prompt, max_new_tokens=12, **settings).token_ids for prompt in prompts] == greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 3}, "seed is 3, but nothing is drawn: add temperature, top_k or top_p"),
        ({"seed": 3, "beams": 1}, "seed is 3, but nothing is drawn"),
        ({"seed": 3, "temperature": 0.0}, "seed is 3, but nothing is drawn"),
        ({"top_k": 5, "beams": 3}, "3 beams and sampling were both asked for"),
        ({"top_p": 0.5, "beams": 2}, "2 beams and sampling were both asked for"),
        ({"temperature": 0.0, "top_k": 5}, "top_k is 5, and temperature 0 takes the likeliest token"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_p is 0.5, and temperature 0 takes the likeliest token"),
        ({"temperature": 0.0, "beams": 3}, "temperature 0 is greedy, and beams is 3"),
        ({"temperature": 0.0, "num_return": 2}, "num_return is 2, and temperature 0 is greedy"),
        ({"length_penalty": 1.0, "beams": 1}, "length_penalty is 1.0, but there are no beams to order"),
        ({"length_penalty": 1.0, "temperature": 0.7}, "length_penalty is 1.0, but there are no beams to order"),
        ({"num_return": 5, "beams": 3}, "num_return 5 needs at least 5 beams, beams is 3"),
    ],
)
def test_what_would_have_no_effect_is_refused(model: Model, settings: dict[str, Any], message: str) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=message):
            call([1, 10], **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_beams", "there is no setting num_beams: it is called beams here"),
        ("max_tokens", "there is no setting max_tokens: it is called max_new_tokens here"),
        ("max_length", "max_new_tokens counts the new tokens"),
        ("num_return_sequences", "it is called num_return here"),
        ("do_sample", "temperature, top_k or top_p ask for samples"),
        ("temprature", "did you mean temperature?"),
        ("image", "did you mean images?"),
        ("zzz", "there is no setting zzz. Settings: beams, max_new_tokens"),
    ],
)
def test_unknown_settings_are_named_with_the_nearest(model: Model, name: str, message: str) -> None:
    unknown: dict[str, Any] = {name: 3}
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        model.generate([1, 10], **unknown)


def test_as_many_beams_as_texts_are_wanted() -> None:
    assert [GenerateOptions(num_return=count).width for count in (1, 3, 5)] == [3, 3, 5]
    assert options_from({"num_return": 4, "temperature": 1.0}).width == 4


def test_each_request_may_have_its_own_seed(model: Model, tiny_config: ModelConfig) -> None:
    prompt = random_prompt(tiny_config, 1, 9, 0)
    alone = [model.generate(prompt, temperature=1.5, max_new_tokens=8, seed=seed).token_ids for seed in (4, 5, 6)]
    assert len(set(alone)) == 3
    requests = [Request(prompt=prompt, seed=4), Request(prompt=prompt), Request(prompt=prompt, seed=6)]
    together = model.generate(requests, temperature=1.5, max_new_tokens=8, seed=5)
    assert [found.token_ids for found in together] == alone
    with pytest.raises(InputError, match="seed is 4, but nothing is drawn"):
        model.generate(requests)
    with pytest.raises(InputError, match="seed is -1, expected at least 0"):
        model.generate(Request(prompt=prompt, seed=-1), temperature=1.0)
