"""A task through the server's API: the answers and scores are those of the bundle in process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flamingo_export
from flamingo_export.cli import main
from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.server import ServerModel
from flamingo_export.evaluation.settings import Settings

from .conftest import ROOT, Client

TASK, DATA = ROOT / "examples/tasks/shapes.toml", ROOT / "examples/tasks/shapes.jsonl"


def test_open_answers_are_the_bundles(client: Client, nano: flamingo_export.Model, tmp_path: Path) -> None:
    model = ServerModel(f"http://127.0.0.1:{client.port}/v1")
    settings = Settings(shots=(0, 2))
    found = flamingo_export.evaluate(model, TASK, data=DATA, settings=settings, out=tmp_path / "server", report=False)
    wanted = flamingo_export.evaluate(nano, TASK, data=DATA, settings=settings, out=tmp_path / "process", report=False)
    assert found.cells == wanted.cells
    assert found.model["digest"] == wanted.model["digest"]
    for one, other in zip(
        *((tmp_path / name / "predictions.jsonl").read_text().splitlines()[1:] for name in ("server", "process")), strict=True
    ):
        mine, theirs = json.loads(one), json.loads(other)
        assert (mine["text"], mine["prompt"], mine["examples"]) == (theirs["text"], theirs["prompt"], theirs["examples"])
        assert mine["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-4)


def test_closed_answers_are_the_bundles(client: Client, nano: flamingo_export.Model, tmp_path: Path) -> None:
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    lines = [{"id": number, "image": f"{number}.png", "answer": "a red square"} for number in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "t.toml").write_text(
        'metric = "choice"\nform = "caption"\nsupport = "t.jsonl"\ncandidates = ["a red square", "a cross"]\n'
    )
    address = f"http://127.0.0.1:{client.port}/v1"
    scores = []
    for name, model in (("server", ServerModel(address)), ("process", nano)):
        flamingo_export.evaluate(
            model,
            tmp_path / "t.toml",
            data=tmp_path / "t.jsonl",
            settings=Settings(shots=(1,)),
            out=tmp_path / name,
            report=False,
        )
        rows = (tmp_path / name / "predictions.jsonl").read_text().splitlines()[1:]
        scores.append([json.loads(row)["logprobs"] for row in rows])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_the_command(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "eval",
        "--server",
        f"http://127.0.0.1:{client.port}/v1",
        "--task",
        str(TASK),
        "--data",
        str(DATA),
        "--shots",
        "0",
        "--json",
    ]
    assert main(line) == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["value"] == 100
    assert main([*line, "--model", "none"]) == 1
    assert "has the models nano; name one" in capsys.readouterr().err
    assert main([*line, "--max-new-tokens", "9000"]) == 1
    assert "answered 4" in capsys.readouterr().err
    assert main(["eval", "b", *line[1:]]) == 2
    assert "--server has the model" in capsys.readouterr().err


def test_servers_that_are_none(client: Client) -> None:
    with pytest.raises(EvaluationError, match="not the address of a server"):
        ServerModel("file:///etc/passwd")
    with pytest.raises(EvaluationError, match="does not answer"):
        ServerModel("http://127.0.0.1:9/v1")
    with pytest.raises(EvaluationError, match="answered 404"):
        ServerModel(f"http://127.0.0.1:{client.port}/v2")
