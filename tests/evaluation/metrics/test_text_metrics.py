"""Metrics of texts beside the official code's values, libraries' and hand-reckoned ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.metrics.base import Outcome
from flamingo_export.evaluation.metrics.caption import Cider, tokenised
from flamingo_export.evaluation.metrics.registry import METRICS, metric_of
from flamingo_export.evaluation.metrics.vqa import accuracy, normalised
from flamingo_export.evaluation.metrics.wups import Wups, word_similarity, wups
from flamingo_export.evaluation.task import Item
from tests.evaluation import vqa_cases


def item(*references: str, kind: str = "") -> Item:
    return Item(id="1", medium=None, references=references, kind=kind)


def scores(name: str, items: Sequence[Item], texts: Sequence[str]) -> list[float]:
    found = METRICS[name].score(items, [Outcome(text=text) for text in texts]).items
    assert found is not None
    return [float(value) for value in found]


def test_vqa_accuracy_is_the_official_rules() -> None:
    record = json.loads(vqa_cases.RECORD.read_text())
    assert record["cases_sha256"] == vqa_cases.digest(), "the cases changed: record the official values again"
    ours = [100 * accuracy(said, answers) for said, answers in vqa_cases.cases()]
    assert len(ours) == 1000
    np.testing.assert_allclose(ours, record["accuracy"], atol=1e-7)
    assert {round(value) for value in ours} >= {0, 30, 60, 90, 100}


def test_vqa_accuracy_by_hand() -> None:
    # Three of ten say it: leaving one of them out leaves 2/3, leaving another out leaves 1.
    assert accuracy("Red.", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert accuracy("red", []) == 0
    assert normalised("The  dont, 1,000") == "don't 1000"


def test_exact_top1_ivqa() -> None:
    assert scores("exact", [item("a red square"), item("Red")], [" a red square\n", "red"]) == [100, 0]
    assert scores("top1", [item("someone"), item("Red")], ["Some one", "red "]) == [0, 100]
    assert scores("ivqa_accuracy", [item("spoon", "Spoon", "ladle", "fork", "fork")] * 3, ["spoon", "ladle", "knife"]) == [
        100,
        50,
        0,
    ]


def test_unknown_metric() -> None:
    with pytest.raises(EvaluationError, match="Choose one of: exact, top1"):
        metric_of("bleu")  # type: ignore[arg-type]


CAPTIONS = [
    ("A man's riding a horse, isn't he?", ["a man riding a horse", "The man rides his horse.", "someone on a horse"]),
    ("café ☕ (on the table)", ["a café table", "coffee\u2028on a table", "`a` cup - on -- the table"]),
    ("", ["an empty street", "a street; nobody there"]),
]


@pytest.fixture
def java() -> None:
    pytest.importorskip("pycocoevalcap", reason="CIDEr needs the extra `eval`")
    if shutil.which("java") is None:
        pytest.skip("CIDEr's tokenizer needs Java")


@pytest.mark.usefixtures("java")
def test_cider_is_pycocoevalcaps() -> None:
    from pycocoevalcap.cider.cider import Cider as Official
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    plain = [(said, [" ".join(text.split()) for text in references]) for said, references in CAPTIONS[:1] * 2 + CAPTIONS[1:2]]
    truth = PTBTokenizer().tokenize(
        {at: [{"caption": text} for text in references] for at, (_, references) in enumerate(plain)}
    )
    said = PTBTokenizer().tokenize({at: [{"caption": text}] for at, (text, _) in enumerate(plain)})
    _, official = Official().compute_score(truth, said)
    found = scores("cider", [item(*references) for _, references in plain], [text for text, _ in plain])
    np.testing.assert_allclose(found, 100 * official)
    assert found[0] > 0


@pytest.mark.usefixtures("java")
def test_captions_keep_their_places() -> None:
    """Empty texts and line separators of Unicode shift none of those that follow."""
    texts = [text for said, references in CAPTIONS for text in (said, *references)]
    found = tokenised(texts)
    assert len(found) == len(texts)
    assert found[0] == "a man 's riding a horse is n't he"
    assert found[4].startswith("café ☕ ")
    assert found[6] == "coffee on a table"
    assert found[8] == ""
    assert found[9] == "an empty street"


def test_what_cider_needs_is_said_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(EvaluationError, match="apt-get install default-jre-headless"):
        Cider().require()


def _network() -> SimpleNamespace:
    """A stand-in for WordNet: senses on a line, similarity falls with distance."""

    class Sense:
        def __init__(self, place: float) -> None:
            self.place = place

        def wup_similarity(self, other: Sense) -> float | None:
            return max(0.0, 1 - abs(self.place - other.place))

    places = {"dog": 0.0, "cat": 0.1, "car": 0.9}
    return SimpleNamespace(synsets=lambda word: [Sense(places[word])] if word in places else [])


def test_wups_is_the_lower_of_both_directions() -> None:
    network = _network()

    def similar(one: str, other: str) -> float:
        return word_similarity(network, one, other)

    assert wups(["dog"], ["cat"], similar) == pytest.approx(0.9)
    assert wups(["dog"], ["dog", "car"], similar) == pytest.approx(0.1)  # the car has nothing nearer than the dog
    assert wups(["the", "dog"], ["dog"], similar) == 1.0  # a word that is not known is passed over
    assert wups(["qq"], ["dog"], similar) == 0.0
    assert wups([], ["dog"], similar) == 0.0


def test_wups_on_wordnet() -> None:
    try:
        Wups().require()
    except EvaluationError as error:
        pytest.skip(str(error))
    items = [item("dog"), item("two dogs"), item("two", kind="DC"), item("crawl", "crawl forward")]
    found = scores("wups", items, ["cat", "two dog", "2", "crawls"])
    np.testing.assert_allclose(found, [85.714286, 100, 0, 100], atol=1e-4)


class _Taxonomy:
    """nltk's reader of WordNet over a tree of five senses: what Wu and Palmer's measure needs, and a morphology of two words."""

    ABOVE: ClassVar[dict[str, str | None]] = {
        "entity": None, "animal": "entity", "vehicle": "entity", "dog": "animal", "cat": "animal", "car": "vehicle"
    }  # fmt: skip

    class Sense:
        def __init__(self, name: str) -> None:
            self.line: list[str] = []
            above: str | None = name
            while above is not None:
                self.line.insert(0, above)
                above = _Taxonomy.ABOVE[above]

        def wup_similarity(self, other: _Taxonomy.Sense) -> float:
            """Twice the depth of what both fall under, over the sum of their depths."""
            shared = sum(one == two for one, two in zip(self.line, other.line, strict=False))
            return 2 * shared / (len(self.line) + len(other.line))

    def ensure_loaded(self) -> None:
        pass

    def synsets(self, word: str) -> list[Sense]:
        return [self.Sense(word)] if word in self.ABOVE else []

    def morphy(self, word: str) -> str | None:
        return {"dogs": "dog", "cars": "car"}.get(word, word if word in self.ABOVE else None)


def test_wups_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = pytest.importorskip("nltk.corpus")
    monkeypatch.setattr(corpus, "wordnet", _Taxonomy())
    Wups().require()
    asked = [
        (item("dog"), "a cat", 200 / 3),  # two of three steps down are shared; "a" is not known
        (item("dog"), "car", 100 / 3),
        (item("car", "cat"), "dog", 200 / 3),  # the best reference
        (item("two dogs"), "Two DOG!", 100),  # the same words once they are lemmas
        (item("dog cat"), "car", 100 / 9),  # both words of the answer are a third like it
        (item("dog"), "", 0),
        (item(), "dog", 0),
        (item("two", kind="DC"), "2", 0),  # a number is right or wrong
        (item("dog", kind="DC"), "cat", 0),
        (item("no", "dogs", kind="DB"), "Dog", 100),
    ]
    found = scores("wups", [each for each, _, _ in asked], [said for _, said, _ in asked])
    np.testing.assert_allclose(found, [value for _, _, value in asked])


def test_without_nltk_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(EvaluationError, match=r"WUPS needs nltk \(.*\)\. Install it: pip install .*eval"):
        Wups().require()


def test_what_wups_needs_is_said_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = pytest.importorskip("nltk.corpus")
    monkeypatch.setattr(corpus, "wordnet", _Missing())
    with pytest.raises(EvaluationError, match=r"nltk\.downloader wordnet"):
        Wups().require()


class _Missing:
    def ensure_loaded(self) -> None:
        raise LookupError("wordnet")
