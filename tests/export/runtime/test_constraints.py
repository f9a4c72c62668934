"""Answers of a given form: jsonschema and re are the oracles, random logits the model; and every search keeps to the form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import flamingo_export
from flamingo_export.errors import InputError
from flamingo_export.runtime.constraints import MAX_GRAMMAR, Form, Forms
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.sources.choice import source_for_size
from flamingo_reference.config import ModelConfig

pytest.importorskip("llguidance", reason="the extra `constraints`")
jsonschema = pytest.importorskip("jsonschema", reason="the oracle of JSON schemas")

SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {"shape": {"enum": ["square", "circle"]}, "count": {"type": "integer", "minimum": 0, "maximum": 12}},
        "required": ["shape", "count"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": ["boolean", "null"]}, "maxItems": 3},
    {"anyOf": [{"const": "red"}, {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}]},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"type": "string", "maxLength": 4},
    {"$defs": {"node": {"type": "object", "properties": {"n": {"$ref": "#/$defs/node"}}, "additionalProperties": False}},
     "$ref": "#/$defs/node"},
    {"type": "string", "format": "date"},
]  # fmt: skip
REGEXES = [r"[0-9]{3}-[A-F]+", r"(red|green)( square)?", r"^[0-9]+/[0-9]+$", r"é{1,3}", r"a\/b|c", r"(?i:yes|no)\."]
CHOICES = [
    ["red", "green", "red square"],
    ["yes", "no"],
    ['a "quoted" one', "b\\c", "two\nlines", "schön"],
    ["a", "ab", "abc"],
    ["a\x7fb", "\x00", "\u2028"],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flamingo_export.Model]:
    path = tmp_path_factory.mktemp("forms") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, parity="skip")
    with flamingo_export.load(path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def forms(model: flamingo_export.Model) -> Forms:
    assert model.tokenizer is not None
    return Forms(model.tokenizer.to_json, model.config)


def answer(
    model: flamingo_export.Model, forms: Forms, options: GenerateOptions, seed: int, most: int = 120
) -> tuple[str, bool]:
    """What a search makes of random logits, and whether it ended by itself."""
    rng = np.random.default_rng(seed)
    tokenizer, size = model.tokenizer, model.config.language_model.vocab_size
    assert tokenizer is not None
    search = options.search(model.config, most, prompt=[1, 50], decode=tokenizer.decode, forms=forms)
    assert search.num_candidates is None, "the best few tokens cannot decide"
    rows = 1
    while search.advance(rng.normal(size=(rows, size)).astype(np.float32) * 3) is not None:
        rows = search.width
    best = search.results()[0]
    return tokenizer.decode(best.token_ids), best.reason == "stop"


WAYS: list[dict[str, Any]] = [
    {"beams": 1}, {"beams": 3}, {"temperature": 1.0, "num_return": 2, "seed": 1}, {"top_k": 5, "seed": 2}, {"min_p": 0.1, "seed": 3},
    {"beams": 1, "repetition_penalty": 3.0, "no_repeat_ngram": 1}, {"beams": 2, "min_new_tokens": 30},
]  # fmt: skip


def holds(model: flamingo_export.Model, forms: Forms, form: dict[str, Any], right: Callable[[str], bool]) -> int:
    """Checks answers of all kinds of searches; how many were not cut."""
    ended = 0
    for seed, way in enumerate([*WAYS, *WAYS]):
        text, whole = answer(model, forms, GenerateOptions(**way, **form), seed)
        if whole:
            ended += 1
            assert text.removeprefix(" ") == text or text[0] == " "
            assert right(text.removeprefix(" ")), (way, text)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_json_of_a_schema(model: flamingo_export.Model, forms: Forms, number: int) -> None:
    schema = SCHEMAS[number]
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())

    def right(text: str) -> bool:
        return bool(validator.is_valid(json.loads(text)))

    # A string or number that never ends is cut; that is seldom.
    assert holds(model, forms, {"json_schema": schema}, right) >= 7


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regular_expression(model: flamingo_export.Model, forms: Forms, regex: str) -> None:
    assert holds(model, forms, {"regex": regex}, lambda text: re.fullmatch(regex, text) is not None) >= 10


@pytest.mark.parametrize("choice", CHOICES)
def test_one_of_several_texts(model: flamingo_export.Model, forms: Forms, choice: list[str]) -> None:
    assert holds(model, forms, {"choice": choice}, choice.__contains__) == 2 * len(WAYS)


def test_every_choice_is_found_and_no_other_way_is_allowed(model: flamingo_export.Model, forms: Forms) -> None:
    """All token sequences that a guide allows, against all that spell one of the texts."""
    choice = ["red", "green", "a red"]
    tokenizer = model.tokenizer
    assert tokenizer is not None
    eoc = model.config.tokens.eoc
    found: set[str] = set()
    guide_of = lambda: forms.guide(Form(choice=tuple(choice)))  # noqa: E731
    frontier: list[tuple[int, ...]] = [()]
    while frontier:
        longer = []
        for text in frontier:
            guide = guide_of()
            for length in range(len(text) + 1):
                allowed = guide.allowed(text[:length])
            for token in np.flatnonzero(allowed).tolist():
                if token == eoc:
                    found.add(tokenizer.decode(text).removeprefix(" "))
                else:
                    longer.append((*text, token))
        frontier = longer
    assert found == set(choice)


def test_beams_are_the_best_texts_of_the_form(model: flamingo_export.Model) -> None:
    """Against the model's own scores of all that the form allows, where there are few."""
    picture = np.full((32, 32, 3), 200, np.uint8)
    choice = ["red", "green", "blue"]
    found = model.generate("<image>Output:", images=[picture], beams=3, num_return=3, choice=choice)
    scores = model.score("<image>Output:", choice, images=[picture])
    ranked = sorted(scores, key=lambda score: -score.logprob)
    best_of_each = {text.text: text.score for text in reversed((found, *found.alternatives))}
    assert set(best_of_each) <= set(choice)
    assert found.text in choice
    # Reported probabilities are the model's own, before the form.
    for score in ranked:
        if score.candidate in best_of_each:
            assert best_of_each[score.candidate] >= score.logprob - 1e-4


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "a" * (MAX_GRAMMAR + 1)}, f"at most {MAX_GRAMMAR}"),
        ({"json_schema": {"type": "wrong"}}, "Invalid type"),
        ({"json_schema": False}, "Unsatisfiable"),
        ({"json_schema": {"$ref": "https://example.org/a.json"}}, "not present"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "cannot be followed"),
        ({"json_schema": {"unevaluatedProperties": False}}, "unevaluatedProperties"),
        ({"json_schema": {"enum": [f"{number:09d}" for number in range(20000)]}}, f"at most {MAX_GRAMMAR}"),
        (
            {"json_schema": {"allOf": [{"anyOf": [{"properties": {f"k{a}{b}": {"type": "integer"}}} for b in range(6)]} for a in range(8)]}},
            "too large",
        ),
        ({"json_schema": {"type": "object", "default": {1, 2}}}, "is not JSON"),
        ({"choice": ["a" * MAX_GRAMMAR, "b"]}, f"at most {MAX_GRAMMAR}"),
    ],
)  # fmt: skip
def test_faulty_forms_and_those_that_explode(
    model: flamingo_export.Model, forms: Forms, form: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        GenerateOptions(beams=1, **form).search(model.config, 9, forms=forms)


@pytest.mark.parametrize(
    "form",
    [
        {"json_schema": {"$ref": "#"}},
        {"regex": "((a|b)*c){1,2000}(x|y){5000}"},
        {"regex": "(.*a.{12}){1,30}"},
        {"json_schema": {"type": "string", "minLength": 50000, "maxLength": 100000}},
        {"json_schema": {"type": "array", "minItems": 100000}},
    ],
)
def test_large_forms_end_in_time(model: flamingo_export.Model, forms: Forms, form: dict[str, Any]) -> None:
    """They are followed as far as they go, or refused; never a hang."""
    try:
        answer(model, forms, GenerateOptions(beams=1, **form), 0, most=40)
    except InputError as error:
        assert "form" in str(error)  # noqa: PT017


def test_settings_of_forms(model: flamingo_export.Model) -> None:
    for settings, said in (
        ({"regex": "a", "choice": ["a"]}, "only one of json_schema, regex and choice"),
        ({"choice": "red"}, "expected a list of texts"),
        ({"choice": ["a", " "]}, "none of them blank"),
        ({"json_schema": "{}"}, "expected an object"),
        ({"regex": 3}, "expected a text"),
    ):
        with pytest.raises(InputError, match=said):
            model.generate("<image>Output:", images=[np.zeros((9, 9, 3), np.uint8)], **settings)


def sentencepiece_like() -> Any:
    """A tokenizer of the kind that LLaMA has: characters with a mark for blanks, and bytes beside them."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers

    words = ["<PAD>", "<BOS>", "<EOC>", "<image>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "r", "e", "d", "g", "n", "re", "▁re", "▁red", "ee", "gr"]
    merges = [("r", "e"), ("▁", "re"), ("▁re", "d"), ("e", "e"), ("g", "r")]
    fast = Fast(models.BPE({word: index for index, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    fast.add_special_tokens(words[:5])
    return fast


def test_a_tokenizer_of_characters_and_bytes(tiny_config: ModelConfig) -> None:
    import msgspec

    fast = sentencepiece_like()
    config = msgspec.structs.replace(
        tiny_config, language_model=msgspec.structs.replace(tiny_config.language_model, vocab_size=fast.get_vocab_size())
    )
    tokenizer = Tokenizer(fast, config)
    forms = Forms(tokenizer.to_json, config)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        search = GenerateOptions(beams=1 + seed % 2, choice=["red", "green", "ü"]).search(config, 30, forms=forms)
        rows = 1
        while search.advance(rng.normal(size=(rows, fast.get_vocab_size())).astype(np.float32)) is not None:
            rows = search.width
        assert tokenizer.decode(search.results()[0].token_ids).strip() in ("red", "green", "ü")


def test_a_tokenizer_of_whole_words_is_refused_by_name(tiny_config: ModelConfig) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    fast = Fast(models.WordLevel({"<PAD>": 0, "<BOS>": 1, "<EOC>": 2, "<image>": 3, "red": 4}, unk_token="<PAD>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(InputError, match="tokenizer cannot be constrained"):
        Forms(fast.to_str, tiny_config).guide(Form(choice=("red",)))


def test_without_llguidance_it_says_what_to_install(
    tiny_config: ModelConfig, forms: Forms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install '.\[constraints\]'"):
        Forms(lambda: "{}", tiny_config).guide(Form(regex="a"))


def test_without_a_tokenizer(tiny_config: ModelConfig) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        GenerateOptions(regex="a").search(tiny_config, 9)
