"""A run from data to tables: prompts as the paper has them, resuming, pairs, what is said before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
import pytest
from made_models import Echo, Seeing
from PIL import Image

import flamingo_export
from flamingo_export.errors import CapacityError, EvaluationError
from flamingo_export.evaluation.compare import compare
from flamingo_export.evaluation.protocol import Answer
from flamingo_export.evaluation.results import read_results
from flamingo_export.evaluation.settings import Settings

SETTINGS = Settings(shots=(0, 2), unit=2, seed=3)


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    return published.write("vqav2", tmp_path / "data")


def run(model: Any, data: Path, out: Path | None = None, **given: Any) -> Any:
    given.setdefault("settings", SETTINGS)
    return flamingo_export.evaluate(model, given.pop("task", "vqav2"), data=data, out=out, report=False, **given)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_prompts_are_the_papers(vqa: Path, tmp_path: Path) -> None:
    model = Echo()
    found = run(model, vqa, tmp_path / "out")
    shown = "<image>Question: What colour is thing {}? Answer: red<EOC>"
    zero, two = model.asked[:4], model.asked[4:]
    for prompt in two:
        first, second, query = prompt.removeprefix("<BOS>").split("<EOC>")
        assert first.startswith("<image>Question: What colour is thing ")
        assert second.endswith("Answer: red")
        assert query.startswith("<image>Question: ")
        assert query.endswith("? Answer:")
        assert shown.format(first.split("thing ")[1][0]).startswith(first)
    for prompt in zero:
        assert prompt.count("<image>") == 1
        assert prompt.count("Answer: red<EOC>") == 2
        assert prompt.startswith("<BOS>Question: ")
    # Nine of ten say red: leaving any one out leaves more than three.
    assert found.cell(0).value == 100
    assert found.cell(2).items == 4
    assert [cell.group for cell in found.cells] == ["all", "answers: other"] * 2
    head, *rest = lines(tmp_path / "out")
    assert head["model"]["digest"] == "digest of echo"
    assert head["settings"]["seed"] == 3
    assert len(rest) == 8
    assert rest[-1]["token_logprobs"] == [-0.5, -0.25]
    assert len(rest[-1]["examples"]) == 2
    assert read_results(tmp_path / "out") == found


def test_nothing_before_the_query(vqa: Path) -> None:
    model = Echo()
    run(model, vqa, settings=Settings(shots=(0,), zero_shot="nothing"))
    assert all(prompt.startswith("<BOS><image>Question: ") and "<EOC>" not in prompt for prompt in model.asked)


def test_limit_draws_the_same_items_for_a_seed(vqa: Path, tmp_path: Path) -> None:
    chosen = []
    for number in range(2):
        out = tmp_path / str(number)
        run(Echo(), vqa, out, settings=Settings(shots=(0,), limit=2, seed=5))
        chosen.append([line["id"] for line in lines(out)[1:]])
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 2


class Killed(Exception):
    pass


class Mortal(Echo):
    """Dies at a call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def generate(self, *arguments: Any, **settings: Any) -> list[Answer]:
        if self.calls == 0:
            raise Killed
        self.calls -= 1
        return super().generate(*arguments, **settings)


TABLES = ("results.csv", "scores.csv")


def test_an_interrupted_run_resumes_and_ends_in_the_same_table(vqa: Path, tmp_path: Path) -> None:
    run(Echo(), vqa, tmp_path / "whole")
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in TABLES}
    out = tmp_path / "out"
    for calls in (0, 1, 1):
        with pytest.raises(Killed):
            run(Mortal(calls), vqa, out)
    model = Echo()
    run(model, vqa, out)
    assert len(model.asked) == 4  # of eight, in units of two, two units were there
    assert {name: (out / name).read_bytes() for name in TABLES} == whole


@pytest.mark.parametrize("kept", range(0, 100, 7))
def test_cut_off_anywhere(vqa: Path, tmp_path: Path, kept: int) -> None:
    """What a kill leaves is a beginning of the file, in the middle of a line or of a unit."""
    out = tmp_path / "out"
    run(Echo(), vqa, out)
    whole = {name: (out / name).read_bytes() for name in TABLES}
    data = (out / "predictions.jsonl").read_bytes()
    head = data.index(b"\n") + 1
    (out / "predictions.jsonl").write_bytes(data[: head + (len(data) - head) * kept // 100])
    for name in ("results.json", *TABLES):
        (out / name).unlink()
    model = Echo()
    run(model, vqa, out)
    assert {name: (out / name).read_bytes() for name in TABLES} == whole
    assert len(model.asked) >= 8 * (100 - kept) // 100

    def without_times(text: bytes) -> list[dict[str, Any]]:
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in text.splitlines()]

    assert without_times((out / "predictions.jsonl").read_bytes()) == without_times(data)


def test_results_of_another_run_are_not_resumed(vqa: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(Echo(), vqa, out)
    with pytest.raises(EvaluationError, match=r"settings\.seed was 3, is 4"):
        run(Echo(), vqa, out, settings=Settings(shots=(0, 2), unit=2, seed=4))
    with pytest.raises(EvaluationError, match=r"model\.name was 'echo', is 'other'"):
        run(Echo("other"), vqa, out)
    assert run(Echo("other"), vqa, out, overwrite=True).model["name"] == "other"
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("")
    with pytest.raises(EvaluationError, match="holds files that do not belong to an evaluation"):
        run(Echo(), vqa, tmp_path / "else")


def test_pairs(vqa: Path, tmp_path: Path) -> None:
    worse = Echo("worse", suffix="dish")
    found = run(Echo(), vqa, tmp_path / "out", against=worse)
    cell = found.cell(2)
    assert (cell.value, cell.against, cell.difference) == (100, 0, 100)
    assert (cell.difference_low, cell.difference_high, cell.changed) == (100, 100, 4)
    assert found.against["name"] == "worse"
    assert [prompt for prompt in worse.asked if prompt.count("<image>") > 1]
    # The same, the other one's answers read from an earlier run of it.
    run(worse, vqa, tmp_path / "earlier")
    again = run(Echo(), vqa, tmp_path / "again", against=tmp_path / "earlier")
    assert again.cell(2) == cell
    fresh = Echo()
    with pytest.raises(EvaluationError, match="settings differ"):
        run(fresh, vqa, against=tmp_path / "earlier", settings=Settings(shots=(0, 2), unit=2, seed=8))
    assert fresh.asked == []


def test_runs_side_by_side(vqa: Path, tmp_path: Path) -> None:
    run(Echo(), vqa, tmp_path / "a")
    run(Echo("worse", suffix="dish"), vqa, tmp_path / "b")
    found = compare([tmp_path / "a", tmp_path / "b"])
    row = next(row for row in found.rows if (row.shots, row.group) == (2, "all"))
    assert row.differences == (None, (-100, -100, -100))
    assert row.shared_items == (0, 4)
    with pytest.raises(EvaluationError, match="two or more folders"):
        compare([tmp_path / "a"])
    with pytest.raises(EvaluationError, match=r"has no results\.json"):
        compare([tmp_path / "a", tmp_path])


def test_closed_answers_are_averaged_over_orders(tmp_path: Path) -> None:
    data = published.write("star", tmp_path)
    model = Echo()
    found = run(model, data, tmp_path / "out", task="star", settings=Settings(shots=(2,), ensemble=2))
    assert found.cell(2).value == 100  # the examples all say "The bag."
    line = lines(tmp_path / "out")[1]
    assert line["candidates"] == ["The book.", "The bag.", "The cup.", "The door."]
    assert line["logprobs"] == pytest.approx([-0.09, 1.92, -0.08, -0.09])
    assert len(model.asked) == 6


def test_an_open_ensemble_takes_the_likeliest_of_what_its_orders_find(tmp_path: Path) -> None:
    class Fickle(Echo):
        """Says what stands last, and finds "b" the likeliest."""

        def score(self, requests: Any, candidates: Any) -> list[list[float]]:
            return [[float(each == "b") for each in choices] for choices in candidates]

    (tmp_path / "t.toml").write_text('metric = "exact"\nform = "caption"\nsupport = "s.jsonl"\n')
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": 1, "text_only": True, "answers": ["b"], "answer": "c"}))
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({"id": each, "text_only": True, "answer": each}) for each in "ab"))
    found = run(
        Fickle(), tmp_path / "q.jsonl", tmp_path / "out", task=tmp_path / "t.toml", settings=Settings(shots=(2,), ensemble=2)
    )
    assert found.cell(2).value == 100
    assert sorted(lines(tmp_path / "out")[1]["candidates"]) == ["a", "b"]


def test_similar_examples_come_last(vqa: Path, tmp_path: Path) -> None:
    found = run(Seeing(), vqa, tmp_path / "out", settings=Settings(shots=(4,), select="rices"))
    assert found.features == "mean colours"
    assert (tmp_path / "out" / "examples.index" / "features-00000.safetensors").is_file()
    # Interrupted before the first unit was written, only the index is there.
    (tmp_path / "out" / "predictions.jsonl").unlink()
    for name in ("results.json", "results.csv", "scores.csv"):
        (tmp_path / "out" / name).unlink()
    assert run(Seeing(), vqa, tmp_path / "out", settings=Settings(shots=(4,), select="rices")).cell(4) == found.cell(4)
    # Another model's features are of another index, which --overwrite replaces.
    settings = Settings(shots=(4,), select="rices")
    with pytest.raises(EvaluationError, match="bundle differ"):
        run(Seeing("other"), vqa, tmp_path / "out", settings=settings)
    assert run(Seeing("other"), vqa, tmp_path / "out", settings=settings, overwrite=True).model["name"] == "other"


def test_media_that_are_gone(vqa: Path, tmp_path: Path) -> None:
    gone = vqa / "val2014" / "COCO_val2014_000000000101.jpg"
    gone.unlink()
    model = Echo()
    with pytest.raises(EvaluationError) as error:
        run(model, vqa)
    assert str(gone) in str(error.value)
    assert "--skip-missing" in str(error.value)
    found = run(model, vqa, skip_missing=True)
    assert found.left_out == {"queries whose media are gone": 1}
    assert found.cell(0).items == 3


def test_texts_are_shown_without_their_media(vqa: Path) -> None:
    for path in (vqa / "train2014").iterdir():
        path.unlink()
    assert run(Echo(), vqa, settings=Settings(shots=(0,))).cell(0).value == 100
    with pytest.raises(EvaluationError, match="the media of 4 of 4 items are not there, or are empty files"):
        run(Echo(), vqa, settings=Settings(shots=(0, 1)))


def test_what_cannot_be_is_said_before_any_work(vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo(most_media=4)
    with pytest.raises(CapacityError, match="at most 4 media"):
        run(model, vqa, settings=Settings(shots=(4,)))
    with pytest.raises(EvaluationError, match="8 examples are wanted and there are 4"):
        run(model, vqa, settings=Settings(shots=(8,)))
    with pytest.raises(EvaluationError, match="shots are"):
        run(model, vqa, settings=Settings(shots=(1, 1)))
    with pytest.raises(EvaluationError, match="reads its files from a folder"):
        run(model, None)  # type: ignore[arg-type]
    own = tmp_path / "own.toml"
    own.write_text('metric = "vqa_accuracy"')
    with pytest.raises(EvaluationError, match=r"^task own reads its items from a file: give --data FILE, JSON Lines$"):
        run(model, None, task=own)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="this model gives none"):
        run(model, vqa, settings=Settings(shots=(2,), select="rices"))
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(EvaluationError, match=r"Java|pycocoevalcap"):
        run(model, published.write("coco", tmp_path), task="coco")
    assert model.asked == []


class Blind(Seeing):
    """Has features and must not be asked for them."""

    def features(self, media: Any) -> Any:
        raise AssertionError("an index was begun")


def test_what_cannot_be_is_said_before_examples_are_encoded(vqa: Path, tmp_path: Path) -> None:
    """Of a large task that takes hours."""
    settings = Settings(shots=(0, 3), select="rices")
    with pytest.raises(CapacityError, match="at most 3 media"):
        run(Blind(most_media=3), vqa, settings=settings)
    with pytest.raises(CapacityError, match="at most 3 media"):
        run(Blind(), vqa, settings=settings, against=Echo(most_media=3))
    with pytest.raises(EvaluationError, match="8 examples are wanted and there are 4"):
        run(Blind(), vqa, settings=Settings(shots=(8,), select="rices"))
    with pytest.raises(AssertionError, match="an index was begun"):
        run(Blind(most_media=4), vqa, settings=settings)


def test_a_long_text_that_no_similar_example_has_does_not_refuse_a_run(tmp_path: Path) -> None:
    class Short(Seeing):
        def check(self, requests: Any, *, beams: int, max_new_tokens: int) -> None:
            if any("endless" in str(request.prompt) for request in requests):
                raise CapacityError("too long")

    rows = [{"id": number, "image": f"{number}.png", "answer": "red" if number else "endless " * 99} for number in range(8)]
    for number in range(8):
        Image.new("RGB", (4, 4), (200 + number, 200, 200) if number else (0, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (4, 4), (200, 220, 200)).save(tmp_path / "q.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "q", "image": "q.png", "answer": "red"}))
    (tmp_path / "t.toml").write_text('metric = "exact"\nform = "caption"\nsupport = "s.jsonl"\n')
    settings = Settings(shots=(6,), select="rices")
    assert run(Short(), tmp_path / "q.jsonl", task=tmp_path / "t.toml", settings=settings).cell(6).value == 100


def test_a_tag_in_a_question_is_named(vqa: Path) -> None:
    file = vqa / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(file.read_text().replace("thing 2", "<image> 2"))
    with pytest.raises(EvaluationError, match=r"item 1020 .* contains the tag <image>"):
        run(Echo(), vqa)


def test_videos_are_looked_at_as_the_settings_say(tmp_path: Path) -> None:
    from flamingo_export.evaluation.items import read_data
    from flamingo_export.evaluation.tasks import task_of
    from flamingo_export.runtime.videos import Video

    data = published.write("star", tmp_path)
    found = read_data(task_of("star"), Settings(shots=(2,), fps=3, num_frames=30), data, None, None)
    for item in (*found.queries, *found.examples):
        assert isinstance(item.medium, Video)
        assert (item.medium.fps, item.medium.num_frames, item.medium.clip) == (3, 30, (1.3, 7.9))
    with pytest.raises(EvaluationError, match=r"fps is 0\.0.*|num_frames is 31"):
        Settings(fps=0.0, num_frames=31).check(task_of("star"))
