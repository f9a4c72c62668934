"""Requests from a file: the answers are those of `generate`, a run that was cut off goes on, a line that fails fails alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import flamingo_export
from flamingo_export.cli import main
from flamingo_export.errors import InputError
from flamingo_export.serve.from_file import run_file

from .conftest import ROOT, image_part, user

EXAMPLES = ROOT / "examples"
SCENES = [f"images/scene_{number}.png" for number in range(1, 9)]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keyed = {record.get("custom_id", record["id"]): record for record in found}
    assert len(keyed) == len(found), "a result twice"
    return keyed


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the example images, to which paths are relative."""
    for name in ("images", "a.png", "q.png", "clip.gif"):
        (tmp_path / name).symlink_to(EXAMPLES / name)
    return tmp_path


def test_answers_are_those_of_generate(nano: flamingo_export.Model, place: Path) -> None:
    lines: list[Any] = [
        {"id": "caption", "images": ["a.png"]},
        {"id": "question", "question": "What colour is the square?", "images": ["q.png"], "beams": 2, "num_return": 2},
        {"id": "prompt", "prompt": "<image>Output:", "images": ["a.png"], "max_new_tokens": 2},
        {"id": "shots", "images": ["q.png"], "shots": [{"image": "a.png", "caption": "two green triangles"}]},
        {"id": "video", "videos": ["clip.gif"]},
        {"id": 7, "images": ["a.png"], "temperature": 1.5, "seed": 3},
    ]
    tally = run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {"beams": 3})
    found = read(place / "out.jsonl")
    assert (tally.done, tally.failed) == (6, 0)
    shots = [flamingo_export.Shot(answer="two green triangles", medium=place / "a.png")]
    wanted: dict[Any, Any] = {
        "caption": nano.caption(place / "a.png", beams=3),
        "question": nano.ask(place / "q.png", "What colour is the square?", beams=2, num_return=2),
        "prompt": nano.generate("<image>Output:", images=[place / "a.png"], beams=3, max_new_tokens=2),
        "shots": nano.caption(place / "q.png", shots=shots, beams=3),
        "video": nano.generate("<image>Output:", videos=[place / "clip.gif"], beams=3),
        7: nano.generate("<image>Output:", images=[place / "a.png"], temperature=1.5, seed=3),
    }
    for key, generation in wanted.items():
        assert (found[key]["text"], tuple(found[key]["token_ids"])) == (generation.text, generation.token_ids), key
        assert found[key]["token_logprobs"] == pytest.approx(generation.token_logprobs, abs=1e-4)
        assert [other["text"] for other in found[key]["alternatives"]] == [other.text for other in generation.alternatives]
    assert found["prompt"]["finish_reason"] == "length"
    assert found["caption"]["finish_reason"] == "stop"


def test_lines_steer_the_search(nano: flamingo_export.Model, place: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "stop": {"beams": 1, "stop": "gr"},
        "penalty": {"beams": 1, "repetition_penalty": 4.0},
        "ngram": {"no_repeat_ngram": 1},
        "least": {"beams": 1, "min_new_tokens": 9},
        "bias": {"beams": 1, "logit_bias": {40: 30.0}, "max_new_tokens": 3},
        "top": {"beams": 1, "top_logprobs": 2},
        "min_p": {"min_p": 0.05, "temperature": 2.0, "seed": 3},
        "early": {"early_stopping": True},
    }
    lines = [{"id": name, "images": ["a.png"], **way} for name, way in ways.items()]
    for _ in range(2):  # the second time all is there already
        run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {"logit_bias": {2: -0.5}, "stop": []})
    found = read(place / "out.jsonl")
    for name, way in ways.items():
        wanted = nano.caption(place / "a.png", **{"logit_bias": {2: -0.5}, **way})
        assert "error" not in found[name], found[name]
        assert (found[name]["text"], tuple(found[name]["token_ids"])) == (wanted.text, wanted.token_ids), name
    assert [len(place) for place in found["top"]["top_logprobs"]] == [2] * len(found["top"]["token_ids"])


def test_openais_batch_format(nano: flamingo_export.Model, place: Path) -> None:
    body = {"model": "nano", "messages": user(image_part())}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "messages": []}},
        {"custom_id": "c", "method": "POST", "url": "/v1/embeddings", "body": body},
        {
            "custom_id": "d",
            "url": "/v1/chat/completions",
            "body": {**body, "messages": user({"type": "image_url", "image_url": "/etc/passwd"})},
        },
    ]
    tally = run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {})
    found = read(place / "out.jsonl")
    wanted = nano.caption(place / "a.png", beams=1)
    assert found["a"]["response"]["status_code"] == 200
    assert found["a"]["response"]["body"]["choices"][0]["message"]["content"] == wanted.text
    assert tally.failed == 3
    for key in "bcd":
        assert found[key]["response"]["status_code"] == 400
        assert found[key]["error"]["message"]


def test_a_batch_refuses_what_the_server_refuses(nano: flamingo_export.Model, place: Path) -> None:
    body = {"model": "nano", "messages": user(image_part())}
    asked = {"response_format": {"type": "xml"}, "top_logprobs": 3, "timeout": -1.0}
    lines = [{"custom_id": name, "url": "/v1/chat/completions", "body": {**body, name: value}} for name, value in asked.items()]
    lines.append({"custom_id": "late", "url": "/v1/chat/completions", "body": {**body, "timeout": 1e-9}})
    assert run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {}).failed == 4
    found = read(place / "out.jsonl")
    for name in asked:
        assert found[name]["response"]["status_code"] == 400
        assert found[name]["error"]["param"] == name
    assert found["late"]["response"]["status_code"] == 503


def test_a_fault_in_a_batched_line_stays_with_it(
    nano: flamingo_export.Model, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: Any) -> None:
        raise ZeroDivisionError("of a library")

    monkeypatch.setattr(nano.engine, "submit", broken)
    body = {"model": "nano", "messages": user(image_part())}
    lines: list[Any] = [{"custom_id": "a", "url": "/v1/chat/completions", "body": body}, {"id": "b", "images": ["a.png"]}]
    assert run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {}).failed == 2
    found = read(place / "out.jsonl")
    assert found["a"]["response"]["status_code"] == 500
    assert "of a library" in found["b"]["error"]


def test_lines_that_failed_before_still_count(nano: flamingo_export.Model, place: Path) -> None:
    """The command run again must not end with 0 while answers are missing."""
    body = {"model": "nano", "messages": []}
    lines: list[Any] = [
        {"id": "a", "images": ["a.png"]},
        {"id": "b", "images": ["gone.png"]},
        {"custom_id": "c", "url": "/v1/chat/completions", "body": body},
    ]
    file, out = write(place / "in.jsonl", lines), place / "out.jsonl"
    assert run_file(nano, file, out, {"beams": 1}).failed == 2
    again = run_file(nano, file, out, {"beams": 1})
    assert (again.before, again.done, again.failed) == (3, 0, 2)
    kept = [line for line in out.read_text().splitlines(keepends=True) if '"gone.png' not in line and '"b"' not in line]
    out.write_text("".join(kept))
    (place / "gone.png").symlink_to(EXAMPLES / "a.png")
    again = run_file(nano, file, out, {"beams": 1})
    assert (again.before, again.done, again.failed) == (2, 1, 1)


def test_a_line_that_fails_fails_alone(nano: flamingo_export.Model, place: Path) -> None:
    lines = [
        {"id": "a", "images": ["a.png"]},
        "{nonsense",
        {"id": "b", "images": ["gone.png"]},
        {"id": "c", "colour": "red"},
        {"id": "d", "images": ["a.png"], "beams": 0},
        {"id": "e", "prompt": "<image>", "question": "both"},
        "[1]",
        '{"id": "g", "images": ["a.png"], "images": ["a.png"]}',
        {"id": "f", "question": "<EOC>", "images": ["a.png"]},
    ]
    tally = run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {})
    found = read(place / "out.jsonl")
    assert (tally.done, tally.failed) == (9, 8)
    assert "error" not in found["a"]
    assert "gone.png" in found["b"]["error"]
    assert "colour" in found["c"]["error"]
    assert "beams" in found["d"]["error"]
    assert "<EOC>" in found["f"]["error"]
    assert "line 2" in found["line 2"]["error"]
    assert "images is given twice" in found["line 8"]["error"]


def test_a_byte_order_mark_is_no_fault(nano: flamingo_export.Model, place: Path) -> None:
    """Windows programs begin files with one."""
    file = write(place / "in.jsonl", [{"id": "a", "images": ["a.png"]}, {"id": "b", "images": ["a.png"]}])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert run_file(nano, file, place / "out.jsonl", {}).failed == 0
    found = read(place / "out.jsonl")
    assert found["a"]["text"] == found["b"]["text"]


def test_an_empty_path_is_not_the_folder(nano: flamingo_export.Model, place: Path) -> None:
    """Its images would be taken as the frames of a video."""
    (place / "b.png").symlink_to(EXAMPLES / "a.png")
    lines = [
        {"id": "image", "images": [""]},
        {"id": "video", "videos": [""]},
        {"id": "shot", "images": ["a.png"], "shots": [{"video": " ", "caption": "a"}]},
    ]
    run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {})
    for record in read(place / "out.jsonl").values():
        assert record["error"] == "a path of an image or video is empty; name a file, or leave it out"


def test_an_address_is_named_as_one(nano: flamingo_export.Model, place: Path) -> None:
    lines = [{"id": "a", "images": ["https://images.example/a.png"]}]
    run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {})
    assert "URLs are not fetched" in read(place / "out.jsonl")["a"]["error"]


def test_it_goes_on_where_it_was(nano: flamingo_export.Model, place: Path) -> None:
    file = write(place / "in.jsonl", [{"id": name, "images": [name]} for name in SCENES])
    out = place / "out.jsonl"
    run_file(nano, file, out, {"beams": 1})
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # a kill -9 in the middle of a line
    tally = run_file(nano, file, out, {"beams": 1})
    assert (tally.before, tally.done) == (3, 5)
    assert out.read_bytes().startswith(b"".join(lines[:3]))
    again = {key: record["token_ids"] for key, record in read(out).items()}
    assert again == {record["id"]: record["token_ids"] for record in map(json.loads, lines)}
    assert run_file(nano, file, out, {"beams": 1}).done == 0


@pytest.mark.parametrize("change", ["requests", "settings"])
def test_results_of_another_run_are_refused(nano: flamingo_export.Model, place: Path, change: str) -> None:
    file = write(place / "in.jsonl", [{"id": "a", "images": ["a.png"]}])
    out = place / "out.jsonl"
    run_file(nano, file, out, {"beams": 1})
    before = out.read_bytes()
    if change == "requests":
        write(file, [{"id": "a", "images": ["q.png"]}])
    with pytest.raises(InputError, match=change):
        run_file(nano, file, out, {"beams": 2 if change == "settings" else 1})
    (place / "out.jsonl.run.json").unlink()
    with pytest.raises(InputError, match="another run"):
        run_file(nano, file, out, {"beams": 1})
    assert out.read_bytes() == before


def test_two_runs_do_not_write_one_file(nano: flamingo_export.Model, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would answer every line again, and cut off what the first is writing."""
    file, out = write(place / "in.jsonl", [{"id": "a", "images": ["a.png"]}]), place / "out.jsonl"
    submit, said = nano.engine.submit, []

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(nano.engine, "submit", submit)
        with pytest.raises(InputError, match=r"another command \(process \d+\) is writing") as refused:
            run_file(nano, file, out, {})
        said.append(refused)
        return submit(*args, **kwargs)

    monkeypatch.setattr(nano.engine, "submit", meanwhile)
    assert run_file(nano, file, out, {}).done == 1
    assert len(said) == 1
    assert list(read(out)) == ["a"]
    assert not (place / "out.jsonl.lock").exists()
    with pytest.raises(InputError, match="is a folder"):
        run_file(nano, file, place, {})


@pytest.mark.parametrize(
    ("lines", "said"), [([], "has no requests"), ([{"id": "a"}, {"id": "a"}], "line 2: the id 'a' stands in line 1")]
)
def test_files_that_cannot_be_meant(nano: flamingo_export.Model, place: Path, lines: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run_file(nano, write(place / "in.jsonl", lines), place / "out.jsonl", {})
    assert not (place / "out.jsonl").exists()


@pytest.mark.slow
def test_killed_and_run_again(nano_bundle: Path, nano: flamingo_export.Model, place: Path) -> None:
    """The command, killed twice without a warning, ends with each answer once."""
    lines = [{"id": str(number), "images": [SCENES[number % 8]], "beams": 1 + number % 3} for number in range(300)]
    file, out = write(place / "in.jsonl", lines), place / "out.jsonl"
    line = [sys.executable, "-c", "import sys; from flamingo_export.cli import main; sys.exit(main())"]
    line += ["generate", str(nano_bundle), "--requests", str(file), "--out", str(out), "--threads", "1"]
    for wanted in (20, 60):
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not out.exists() or out.read_bytes().count(b"\n") < wanted:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "were there already" in done.stderr
    found = read(out)
    assert len(found) == 300
    for number in (0, 10, 299):
        wanted_text = nano.caption(place / SCENES[number % 8], beams=1 + number % 3).text
        assert found[str(number)]["text"] == wanted_text


@pytest.mark.slow
def test_a_disk_that_is_full_is_named_and_what_is_finished_stays(nano_bundle: Path, place: Path) -> None:
    """The system's own limit on the size of files stands for the disk: writes fail in the middle of a line, and name no file."""
    lines = [{"id": str(number), "images": ["a.png"], "beams": 1} for number in range(80)]
    file, out = write(place / "in.jsonl", lines), place / "out.jsonl"
    arguments = ["generate", str(nano_bundle), "--requests", str(file), "--out", str(out), "--threads", "1"]

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        code += "from flamingo_export.cli import main; sys.exit(main())"
        line = [sys.executable, "-B", "-c", code, *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)

    nothing = run(0)
    assert nothing.returncode == 1
    assert f"{out} cannot be written: " in nothing.stderr
    assert not out.exists()
    cut = run(9000)
    assert cut.returncode == 1
    assert f"writing {out} failed: " in cut.stderr
    assert f"kept in {out}. Free some space and run the same command to resume, or remove that file." in cut.stderr
    kept = out.read_bytes()
    assert 1 < kept.count(b"\n") < 80
    whole = kept[: kept.rfind(b"\n") + 1]
    done = run(1 << 20)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(whole)
    assert set(read(out)) == {str(number) for number in range(80)}


def test_the_command_ends_with_1_where_a_line_failed(nano_bundle: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, out = (
        write(place / "in.jsonl", [{"id": "a", "images": ["a.png"]}, {"id": "b", "images": ["gone.png"]}]),
        place / "out.jsonl",
    )
    line = ["generate", str(nano_bundle), "--requests", str(file), "--out", str(out), "--threads", "1", "--beams", "1"]
    assert main(line) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "requests (2) 2 requests in" in said
    assert said.endswith("1 failed")
    out.write_text("".join(each for each in out.read_text().splitlines(keepends=True) if "error" not in each))
    (place / "gone.png").symlink_to(EXAMPLES / "q.png")
    assert main(line) == 0
    assert "1 were there already" in " ".join(capfd.readouterr().err.split())
