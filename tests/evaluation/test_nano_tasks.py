"""The command on the shipped nano checkpoint: its own tasks, a run that is killed, the page; what the model card says."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest

pytest.importorskip("sklearn", reason="nano's digits are scikit-learn's scans")

import flamingo_export
from flamingo_export.cli import main
from flamingo_export.evaluation.results import read_results
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.tasks import task_of
from flamingo_export.sources.choice import source_for_size

CARD = Path(flamingo_export.__file__).parents[1] / "reference/flamingo_reference/nano/MODEL_CARD.md"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, parity="skip")
    return path


def card(table: int) -> dict[str, list[str]]:
    """A table of the model card: its rows' cells by name, in per cent as they are printed."""
    blocks = re.findall(r"(?:^\|.*\n)+", CARD.read_text(encoding="utf-8").split("<!-- numbers -->")[1], flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in blocks[table].splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def evaluated(*arguments: object) -> int:
    return main(["eval", *(str(argument) for argument in arguments)])


@pytest.mark.slow
def test_tasks_need_no_data_and_name_their_examples() -> None:
    for name, count in (("nano-captions", 1099), ("nano-questions", 2198), ("nano-formats", 225), ("nano-labels", 300)):
        task = task_of(name)
        queries, examples = task.read(Path(), task.split).items, task.read(Path(), task.support).items
        assert len(queries) == count
        ids = {item.id for item in examples}
        assert all(name in ids for item in queries for names in item.listed.values() for name in names)


@pytest.mark.slow
def test_a_few_formats_as_the_card_has_them(nano: Path, tmp_path: Path) -> None:
    """Each format: nothing without examples, all right with two."""
    base = (nano, "--task", "nano-formats", "--limit", 24, "--beams", 1, "--out")
    assert evaluated(*base, tmp_path / "bare", "--shots", 0, "--zero-shot", "nothing") == 0
    assert evaluated(*base, tmp_path / "shown", "--shots", "0,2", "--select", "listed") == 0
    assert read_results(tmp_path / "bare").cell(0).value == 0
    shown = read_results(tmp_path / "shown")
    assert (shown.cell(0).value, shown.cell(2).value) == (100, 100)
    assert shown.model["precision"] == "fp32"
    page = (tmp_path / "shown" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") > 12
    assert "<script" not in page
    with (tmp_path / "shown" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["model_digest"] == shown.model["digest"]
    assert {row["shots"] for row in rows} == {"0", "2"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "table"), [("nano-captions", 0), ("nano-questions", 1)])
@pytest.mark.parametrize(
    ("column", "options"),
    [
        (0, ("--zero-shot", "nothing", "--beams", 1)),
        (1, ("--zero-shot", "nothing", "--beams", 3)),
        (2, ("--select", "listed", "--beams", 1)),
    ],
)
def test_the_model_cards_numbers(
    nano: Path, tmp_path: Path, name: str, table: int, column: int, options: tuple[object, ...]
) -> None:
    assert evaluated(nano, "--task", name, "--shots", 0, *options, "--batch-size", 32, "--out", tmp_path / "out") == 0
    found = read_results(tmp_path / "out")
    for group, cells in card(table).items():
        cell = found.cell(0, group)
        assert (f"{cell.value:.1f} %", str(cell.items)) == (cells[column], cells[-1]), group


@pytest.mark.slow
def test_the_model_cards_few_shot_table(nano: Path, tmp_path: Path) -> None:
    base = (nano, "--task", "nano-formats", "--beams", 1, "--batch-size", 32, "--select", "listed", "--out")
    assert evaluated(*base, tmp_path / "shown", "--shots", "0,1,2,4,8,16,32") == 0
    assert evaluated(*base, tmp_path / "bare", "--shots", 0, "--zero-shot", "nothing") == 0
    shown, bare = read_results(tmp_path / "shown"), read_results(tmp_path / "bare")
    for style, cells in card(2).items():
        values = [shown.cell(0, style), bare.cell(0, style), *(shown.cell(shots, style) for shots in (1, 2, 4, 8, 16, 32))]
        assert [f"{value.value:.0f} %" for value in values] == cells, style


def test_a_task_of_ones_own(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that docs/evaluation.md names."""
    tasks = Path(flamingo_export.__file__).parents[1] / "examples" / "tasks"
    line = [
        "eval",
        str(nano),
        "--task",
        str(tasks / "shapes.toml"),
        "--data",
        str(tasks / "shapes.jsonl"),
        "--shots",
        "0,2",
        "--json",
    ]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cell["value"] for cell in found["cells"]] == [100, 100]


START = """
import functools, sys
from flamingo_export.cli import main
from flamingo_export.evaluation import settings
settings.Settings = functools.partial(settings.Settings, unit=4)  # many units in a short run
sys.exit(main())
"""


@pytest.mark.slow
def test_killed_and_resumed(nano: Path, tmp_path: Path) -> None:
    """kill -9 ten times, before the first unit, between units and while one is at work; the tables are those of a run in one go."""
    rows = [{"id": number, "image": f"{number}.png", "answer": "a red square"} for number in range(48)]
    for number in range(48):
        published.picture(tmp_path / f"{number}.png", number)
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "t.toml").write_text('metric = "exact"\nform = "caption"\nsupport = "t.jsonl"\n')
    task = ["--task", tmp_path / "t.toml", "--data", tmp_path / "t.jsonl"]
    line = [nano, *task, "--shots", "0,1", "--beams", 1, "--max-new-tokens", 4, "--threads", 1, "--out"]
    command = [sys.executable, "-c", START, "eval", *map(str, line)]
    subprocess.run([*command, str(tmp_path / "whole")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    out = tmp_path / "out"
    file, rng = out / "predictions.jsonl", np.random.default_rng(0)
    kept: list[int] = []
    for _ in range(10):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = file.stat().st_size if file.exists() else 0
        while process.poll() is None and (not file.exists() or file.stat().st_size <= before + 100):
            time.sleep(0.002)
        time.sleep(float(rng.choice([0, 0.01, 0.03])))
        assert process.poll() is None, "the run ended before it was killed ten times"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(file.read_bytes().count(b"\n") - 1)
    assert kept == sorted(kept)
    assert 0 < kept[-1] < 96
    finished = subprocess.run([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    assert finished.returncode == 0
    for name in ("results.csv", "scores.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    answers = [
        [{key: value for key, value in json.loads(row).items() if key != "seconds"} for row in path.read_bytes().splitlines()]
        for path in (file, tmp_path / "whole" / "predictions.jsonl")
    ]
    assert answers[0] == answers[1]


def test_an_image_that_breaks_off_is_named_and_the_run_resumes_once_it_is_whole(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an interrupted download leaves it: half of a file, which nothing but decoding it shows."""
    for number in range(3):
        published.picture(tmp_path / f"{number}.png", number)
    lines = [json.dumps({"id": number, "image": f"{number}.png", "answer": "a red square"}) for number in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (tmp_path / "t.toml").write_text('metric = "exact"\nform = "caption"\n')
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    data = (nano, "--task", tmp_path / "t.toml", "--data", tmp_path / "t.jsonl")
    line = (*data, "--shots", 0, "--zero-shot", "nothing", "--max-new-tokens", 2, "--beams", 1, "--out", tmp_path / "out")
    assert evaluated(*line) == 1
    assert f"{tmp_path / '1.png'} is damaged or truncated" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "1.png").write_bytes(whole)
    assert evaluated(*line) == 0
    assert read_results(tmp_path / "out").cell(0).items == 3


def test_items_that_share_their_shots_share_the_beginning_of_their_prompts(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same examples for all: the decoder reads them once, and each item costs its own question."""
    from flamingo_export.runtime.model import Model

    reused: list[tuple[int, int]] = []
    generate = Model.generate

    def noted(self: Model, requests: Any, **options: Any) -> Any:
        found = generate(self, requests, **options)
        reused.extend((each.timings.prompt_tokens, each.timings.reused_tokens) for each in found)
        return found

    monkeypatch.setattr(Model, "generate", noted)
    tasks = Path(flamingo_export.__file__).parents[1] / "examples" / "tasks"
    settings = Settings(shots=(2,), select="shared", beams=1, max_new_tokens=2)
    with flamingo_export.load(nano, threads=1) as model:
        flamingo_export.evaluate(model, tasks / "shapes.toml", data=tasks / "shapes.jsonl", settings=settings)
    assert len(reused) == 6
    assert sum(shared > 0.5 * tokens for tokens, shared in reused) == 5


def test_rices_index_search_and_retrieved_shots(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = Path(flamingo_export.__file__).parents[1] / "examples"
    index = tmp_path / "index"
    assert main(["index", str(nano), "--data", str(examples / "shots_captions.jsonl"), "--out", str(index)]) == 0
    assert "4 examples, 128 wide" in capsys.readouterr().out
    assert main(["index", str(nano), "--data", str(examples / "shots_captions.jsonl"), "--out", str(index), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "index": str(index), "count": 4, "width": 128, "features": "image embeddings of the contrastive encoder"
    }  # fmt: skip
    assert (
        main(["search", str(nano), "--index", str(index), "--image", str(examples / "images/shot_scene_2.png"), "--json"]) == 0
    )
    hits = json.loads(capsys.readouterr().out)
    assert hits[0]["item"]["id"] == "2"
    assert hits[0]["cosine"] == pytest.approx(1, abs=1e-5)
    line = [
        "generate",
        str(nano),
        "--shots-from",
        str(index),
        "--num-shots",
        "2",
        "--image",
        str(examples / "images/scene_1.png"),
        "--json",
    ]
    assert main(line) == 0
    prompt = json.loads(capsys.readouterr().out)["prompt"]
    assert prompt.count("<image>Output:") == 3
    assert main([*line[:5], "9", *line[6:]]) == 1
    assert "9 examples are wanted" in capsys.readouterr().err
    assert main(["index", "--dedup", str(index), "--dedup", str(index), "--above", "0.9999", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)
    assert [(pair["first"], pair["second"]) for pair in pairs] == [(str(number), str(number)) for number in range(1, 5)]


@pytest.mark.slow
def test_an_index_made_beforehand(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An example without an answer is not indexed, and the run takes the same ones."""
    data = published.write("vqav2", tmp_path)
    file = data / "v2_mscoco_train2014_annotations.json"
    value = json.loads(file.read_text())
    for answer in value["annotations"][1]["answers"]:
        answer["answer"] = " "
    file.write_text(json.dumps(value))
    index, task = tmp_path / "index", ["--task", "vqav2", "--data", str(data)]
    assert main(["index", str(nano), *task, "--out", str(index)]) == 0
    assert "3 examples" in capsys.readouterr().out
    line = ["eval", str(nano), *task, "--shots", "2", "--select", "rices", "--max-new-tokens", "3", "--json"]
    assert main([*line, "--index", str(index)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["features"] == "image embeddings of the contrastive encoder"
    assert found["left_out"] == {"examples without an answer that can be shown": 1}
    other = tmp_path / "other.bundle"
    flamingo_export.build(source_for_size("nano", seed=1), out=other, parity="skip")
    assert main(["eval", str(other), *line[2:], "--index", str(index)]) == 1
    assert "is an index of something else (bundle, features differ)" in capsys.readouterr().err
    picture = str(data / "val2014/COCO_val2014_000000000100.jpg")
    for verb in (
        ["search", str(other), "--index", str(index), "--image", picture],
        ["generate", str(other), "--shots-from", str(index), "--num-shots", "2", "--image", picture, "--question", "What?"],
    ):
        assert main(verb) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert f"the index {index} was made by another bundle than other.bundle" in said
        assert f"flamingo-export index other.bundle --data ... --out {index} --overwrite" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqav2", "star", "hateful_memes", "imagenet", "rareact", "visdial"])
def test_published_layouts_end_to_end(nano: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = published.write(name, tmp_path)
    shots = "0,2" if name not in ("visdial", "rareact") else "0"
    line = ["eval", str(nano), "--task", name, "--data", str(data), "--shots", shots, "--max-new-tokens", "3", "--json"]
    assert main([*line, *(["--zero-shot", "nothing"] if name == "rareact" else [])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["paper"]["at_32"]
    assert all(cell["items"] for cell in found["cells"])


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["--task", "vqav2"], 2, "one bundle is evaluated, 0 were given"),
        (["b"], 2, "say what to ask"),
        (["b", "--task", "coco", "--shots", "few"], 2, "expected numbers separated by commas"),
        (["b", "--task", "vqa"], 1, "there is no task 'vqa'"),
        (["b", "--task", "coco", "--select", "best"], 1, "expected random, rices, shared or listed"),
        (["--compare", "a"], 1, "two or more folders"),
    ],
)
def test_usage(line: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *line]) == code
    assert said in " ".join(capsys.readouterr().err.split())


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list", "--json"]) == 0
    assert {"vqav2", "nano-labels"} <= {task["name"] for task in json.loads(capsys.readouterr().out)}


def test_prompts_beyond_bank_and_cache_are_refused_before_any_work(nano: Path) -> None:
    from flamingo_export.errors import CapacityError
    from flamingo_export.evaluation.bundles import BundleModel
    from flamingo_export.runtime.prompts import Shot, caption_prompt

    noise = [np.full((8, 8, 3), number, np.uint8) for number in range(80)]
    with flamingo_export.load(nano) as model:
        evaluated = BundleModel(model)
        bank = model.manifest.limits.bank_rows
        many = caption_prompt([Shot(answer="a", medium=picture) for picture in noise[:bank]], noise[79], model.inputs)
        with pytest.raises(CapacityError, match=f"shows {bank + 1} images, the bundle's media bank holds {bank}"):
            evaluated.check([many], beams=3, max_new_tokens=10)
        long = caption_prompt([Shot(answer="red " * 3000, medium=noise[0])], noise[1], model.inputs)
        with pytest.raises(CapacityError, match="the longest prompt has"):
            evaluated.check([long], beams=3, max_new_tokens=10)
        evaluated.check([caption_prompt([], noise[0], model.inputs)], beams=3, max_new_tokens=10)
