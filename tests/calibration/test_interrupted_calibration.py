"""Calibrations that do not get to their end go on where they were; one part of the model is in memory at a time."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from variations import GROUPED, drawn_model

import flamingo_reference.model.modules
from flamingo_calibration import calibrate, discard, layer_runner, run, shipped_samples
from flamingo_export.errors import CalibrationError
from flamingo_export.progress import SILENT
from flamingo_export.sources import LiveSource, RandomSource
from flamingo_export.weights.calibration_table import write_table

CALLS = ("fsync", "replace", "unlink")
"""What a calibration changes the disk with, but for plain writes: it is killed right before one of these."""


class Heard:
    """Keeps the notes of a calibration."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str, total: int, unit: str = "items") -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def make(relative, tmp_path) -> Callable[..., bytes]:
    """Calibrates in `work`, writes the table, removes the folder; returns the table's bytes."""
    samples = shipped_samples(relative, None)[:7]

    def calibration(work: str = "work", seed: int = 7, progress: Any = SILENT) -> bytes:
        source = LiveSource(drawn_model(relative, seed))
        table = calibrate(source, samples, tokenizer=None, work=tmp_path / work, progress=progress)
        out = tmp_path / f"{work}.json"
        write_table(out, table)
        discard(tmp_path / work)
        return out.read_bytes()

    return calibration


def in_child(work: Callable[[], Any], number: int) -> int:
    """Runs `work` in a forked child that is killed before it touches the disk for the `number`-th time; its exit code, 9 if killed."""
    child = os.fork()
    if child == 0:
        gc.freeze()  # what the parent has left for its garbage collector may wait for threads that no child has
        counter = itertools.count(1)

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if next(counter) == number:
                    os._exit(9)
                return function(*args, **kwargs)

            return wrapped

        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        code = 4
        with suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_killed_at_any_moment_the_same_bytes_come_out(make, monkeypatch):
    monkeypatch.setattr(run, "SYNC_SECONDS", 0.0)
    expected = make("whole")
    for number in itertools.count(1, 5):
        if in_child(partial(make, f"killed at {number}"), number) == 0:
            break
        assert make(f"killed at {number}") == expected, number
    assert number > 40  # there were as many touches, and a fifth of them were tried


@pytest.mark.slow
def test_killed_again_and_again_it_gets_to_its_end(make, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SYNC_SECONDS", 0.0)
    expected = make("whole")
    kills = 0
    while in_child(make, 9) == 9:
        kills += 1
        assert kills < 50
    assert kills > 3
    assert (tmp_path / "work.json").read_bytes() == expected
    assert not (tmp_path / "work").exists()


def test_finished_parts_are_not_run_again(make, monkeypatch):
    loaded: list[str] = []
    load = flamingo_reference.model.modules.load_part

    def stop_at(prefix: str | None) -> None:
        def loading(config: Any, wanted: str, read: Any, **options: Any) -> Any:
            if wanted == prefix:
                raise KeyboardInterrupt
            loaded.append(wanted)
            return load(config, wanted, read, **options)

        monkeypatch.setattr(flamingo_reference.model.modules, "load_part", loading)

    heard = Heard()
    stop_at("language_model.layers.1")
    with pytest.raises(KeyboardInterrupt):
        make(progress=heard)
    assert "same command resumes" in heard.notes[-1]
    assert loaded == ["vision_encoder", "resampler", "language_model", "language_model.layers.0"]
    loaded.clear()
    stop_at(None)
    make(progress=heard)
    assert loaded == ["language_model.layers.1", "cross_attention.0", "language_model.layers.2", "language_model"]
    assert "resuming the interrupted calibration: 4 of 8 parts are finished" in heard.notes


@pytest.mark.slow
def test_the_vision_encoder_goes_on_after_the_last_medium(make, monkeypatch):
    expected = make("whole")
    shown: list[int] = []
    load = getattr(layer_runner, "load_medium")  # noqa: B009

    def loading(*arguments: Any, **options: Any) -> Any:
        shown.append(len(shown))
        if len(shown) == 4:
            raise KeyboardInterrupt
        return load(*arguments, **options)

    monkeypatch.setattr(run, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(layer_runner, "load_medium", loading)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert make() == expected
    media = sum(len(sample.media) for sample in shipped_samples(GROUPED, None)[:7])
    assert len(shown) == 4 + media - 3  # three were kept


def interrupted(make, monkeypatch, prefix="cross_attention.0") -> None:
    load = flamingo_reference.model.modules.load_part

    def loading(config: Any, wanted: str, read: Any, **options: Any) -> Any:
        if wanted == prefix:
            raise KeyboardInterrupt
        return load(config, wanted, read, **options)

    with monkeypatch.context() as patched:
        patched.setattr(flamingo_reference.model.modules, "load_part", loading)
        with pytest.raises(KeyboardInterrupt):
            make()


@pytest.mark.slow
def test_work_of_other_weights_is_thrown_away(make, monkeypatch):
    expected = make("whole", seed=8)
    interrupted(make, monkeypatch)
    heard = Heard()
    assert make(seed=8, progress=heard) == expected
    assert any("other weights, data or versions; starting anew" in note for note in heard.notes)


@pytest.mark.slow
def test_work_without_its_hidden_states_is_begun_anew(make, monkeypatch, tmp_path):
    expected = make("whole")
    interrupted(make, monkeypatch)
    (stream,) = (tmp_path / "work").glob("hidden.*.f32")
    stream.write_bytes(stream.read_bytes()[:-4])
    heard = Heard()
    assert make(progress=heard) == expected
    assert any("not complete; starting anew" in note for note in heard.notes)


@pytest.mark.slow
def test_a_broken_journal_is_begun_anew(make, monkeypatch, tmp_path):
    expected = make("whole")
    interrupted(make, monkeypatch)
    (tmp_path / "work" / "journal.json").write_bytes(b"{")
    assert make() == expected


def test_two_at_once_are_refused(make, monkeypatch, tmp_path):
    load = flamingo_reference.model.modules.load_part

    def loading(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(flamingo_reference.model.modules, "load_part", load)
        with pytest.raises(CalibrationError, match="another calibration is at work"):
            make()
        return load(*arguments, **options)

    monkeypatch.setattr(flamingo_reference.model.modules, "load_part", loading)
    make()


def test_a_full_disk_says_what_is_kept(make, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run, "append", full)
        with pytest.raises(CalibrationError, match=r"No space left on device.*run the same command"):
            make()
    make()


def test_one_part_is_in_memory_at_a_time(make, monkeypatch):
    alive: list[weakref.ref[Any]] = []
    load = flamingo_reference.model.modules.load_part

    def loading(*arguments: Any, **options: Any) -> Any:
        assert [part for part in alive if part() is not None] == []
        module = load(*arguments, **options)
        alive.extend(weakref.ref(tensor) for tensor in (module, *module.parameters()))
        return module

    monkeypatch.setattr(flamingo_reference.model.modules, "load_part", loading)
    make()
    assert len(alive) > 40


def test_each_tensor_is_read_once_but_for_embedding_and_norm(relative):
    reads: list[str] = []

    class Source(RandomSource):
        def read(self, name: str) -> Any:
            reads.append(name)
            return super().read(name)

    source = Source(relative, 1)
    calibrate(source, shipped_samples(relative, None)[:7], tokenizer=None)
    twice = {name for name in reads if reads.count(name) > 1}
    assert set(reads) == set(source.names())
    assert twice == {"language_model.embedding.weight", "language_model.norm.weight"}


def test_only_what_the_next_part_needs_stays_on_the_disk(make, monkeypatch, tmp_path):
    kept: list[set[str]] = []
    load = flamingo_reference.model.modules.load_part

    def loading(*arguments: Any, **options: Any) -> Any:
        kept.append({path.name for path in Path(tmp_path / "work").glob("*.f32")})
        return load(*arguments, **options)

    monkeypatch.setattr(flamingo_reference.model.modules, "load_part", loading)
    make()
    latents = "latents.f32"
    # The last layer and the head read no media.
    hidden = [{latents, f"hidden.{number}.f32"} if number < 3 else {f"hidden.{number}.f32"} for number in range(5)]
    assert kept == [set(), {"features.f32"}, {latents}, *hidden]
