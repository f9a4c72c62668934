"""Builds that do not get to their end: killed, interrupted, without space, beside another. Nothing is lost, nothing half written."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorder import Recorder

from flamingo_calibration import run
from flamingo_export import BuildResult, api
from flamingo_export.bundle import verify
from flamingo_export.errors import BuildError, CalibrationError
from flamingo_export.pipeline import work_folder, write_weights
from flamingo_export.quantize.policies import preset
from flamingo_export.sources.choice import RandomWeights
from flamingo_reference.config import ModelConfig

from .conftest import contents, in_child, wait

CALLS = ("write", "fsync", "replace", "rename", "unlink", "mkdir")
"""What a build changes the disk with: it is killed right before one of these."""


def make(config: ModelConfig, out: Path, **options: Any) -> BuildResult:
    return api.build(RandomWeights(config=config, seed=options.pop("seed", 5)), out=out, parity="skip", **options)


def before_call(number: int, action: Callable[[], None]) -> list[int]:
    """Calls `action` before the disk is touched for the `number`-th time; the list's length is the number of touches so far."""
    counter = itertools.count(1)
    touched: list[int] = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            touched.append(next(counter))
            if touched[-1] == number:
                action()
            return function(*args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    return touched


def after_groups(number: int, action: Callable[[], None]) -> None:
    """Calls `action` once `number` groups of weights are in the journal."""
    add = work_folder.Journal.add

    def added(self: work_folder.Journal, group: str, record: work_folder.Finished) -> None:
        add(self, group, record)
        if len(self.groups) == number:
            action()

    work_folder.Journal.add = added  # type: ignore[method-assign]


@pytest.fixture
def _restored() -> Any:
    kept = {name: getattr(os, name) for name in CALLS}
    yield
    for name, function in kept.items():
        setattr(os, name, function)


@pytest.fixture(scope="module")
def undisturbed(spoken_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(spoken_config, tmp_path_factory.mktemp("undisturbed") / "b.bundle").path


def finished_files(place: work_folder.BuildPaths) -> dict[Path, tuple[int, int]]:
    """Files that the journal calls finished, with inode and time of change."""
    journal = work_folder._journal_file(place).read()
    paths = [place.work / record.file.path for record in journal.groups.values()] if journal else []
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.slow
@pytest.mark.usefixtures("_restored")
def test_sigkill_before_any_change_of_the_disk_then_resume(
    spoken_config: ModelConfig, undisturbed: Path, tmp_path: Path
) -> None:
    kept = {name: getattr(os, name) for name in CALLS}
    touched = before_call(-1, lambda: None)
    make(spoken_config, tmp_path / "count.bundle")
    for name, function in kept.items():
        setattr(os, name, function)
    total = len(touched)
    assert total > 50
    rng = np.random.default_rng(1)
    moments = sorted({1, total - 1, total, *(int(n) for n in rng.integers(1, total, 9))})
    resumed = 0
    for moment in moments:
        out = tmp_path / f"kill{moment}" / "b.bundle"

        def killed(out: Path = out, moment: int = moment) -> None:
            before_call(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
            make(spoken_config, out)

        with in_child(killed) as child:
            assert wait(child) == -signal.SIGKILL
        place = work_folder.BuildPaths(out)
        if out.exists():
            assert contents(out) == contents(undisturbed)
            continue
        before = finished_files(place)
        resumed += bool(before)
        recorder = Recorder()
        make(spoken_config, out, progress=recorder)
        assert contents(out) == contents(undisturbed), f"killed before change {moment} of {total}"
        for path, mark in before.items():
            now = (out / path.relative_to(place.work)).stat()
            assert (now.st_ino, now.st_mtime_ns) == mark, f"{path.name} was built again"
        assert bool(before) == any("resuming" in note for note in recorder.notes)
        assert sorted(path.name for path in out.parent.iterdir()) == ["b.bundle"]
    assert resumed


@pytest.mark.slow
def test_sigkill_at_a_moment_of_the_clock(spoken_config: ModelConfig, undisturbed: Path, tmp_path: Path) -> None:
    """Whatever the code is doing. Each build is killed a little later than the one before, until one gets through."""
    out = tmp_path / "b.bundle"

    def slow() -> None:
        write = write_weights._write_all

        def slowly(handle: int, data: memoryview) -> None:
            time.sleep(0.004)
            write(handle, data)

        write_weights._write_all = slowly
        make(spoken_config, out)

    kills = 0
    for delay in np.linspace(0.01, 0.3, 12):
        with in_child(slow) as child:
            time.sleep(delay)
            if out.exists():
                break
            os.kill(child, signal.SIGKILL)
            kills += wait(child) == -signal.SIGKILL
    assert kills
    if not out.exists():
        make(spoken_config, out)
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_replacing_is_never_half_done(spoken_config: ModelConfig, tmp_path: Path) -> None:
    """Killed while the new bundle takes the old one's place: one of the two is there, whole."""
    out = tmp_path / "b.bundle"
    old = contents(make(spoken_config, out, seed=1).path)
    new = contents(make(spoken_config, tmp_path / "new.bundle", seed=2).path)
    exchange = work_folder._exchange
    for moment in ("before", "after", "cannot exchange: before", "cannot exchange: between"):
        make(spoken_config, out, seed=1, overwrite=True)
        assert contents(out) == old

        def die(moment: str = moment) -> None:
            def exchanged(one: Path, other: Path) -> bool:
                if "before" in moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == "after":
                    exchange(one, other)
                    os.kill(os.getpid(), signal.SIGKILL)
                rename = os.rename

                def renamed(*args: Any, **kwargs: Any) -> None:
                    rename(*args, **kwargs)
                    os.kill(os.getpid(), signal.SIGKILL)

                os.rename = renamed
                return False

            work_folder._exchange = exchanged
            make(spoken_config, out, seed=2, overwrite=True)

        with in_child(die) as child:
            assert wait(child) == -signal.SIGKILL
        if "between" in moment:
            assert not out.exists()
        else:
            assert contents(out) == (new if moment == "after" else old)
        # The next build mends what is left, whatever it then does itself.
        with pytest.raises(BuildError, match="exists"):
            make(spoken_config, out, seed=1)
        assert contents(out) == (new if moment == "after" else old)
        make(spoken_config, out, seed=2, overwrite=True)
        assert contents(out) == new
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["b.bundle", "new.bundle"]


def test_two_renames_where_folders_cannot_be_exchanged(
    spoken_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(spoken_config, tmp_path / "b.bundle", seed=1).path
    monkeypatch.setattr(work_folder, "_exchange", lambda one, other: False)
    make(spoken_config, out, seed=2, overwrite=True)
    assert verify.open_bundle(out).source.seed == 2
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["b.bundle"]


def test_the_old_bundle_is_put_back_where_the_new_one_does_not_get_there(
    spoken_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders cannot be exchanged, the old one was set aside, and then the disk refuses the second rename."""
    out = make(spoken_config, tmp_path / "b.bundle", seed=1).path
    old = contents(out)
    place = work_folder.BuildPaths(out)
    rename = os.rename

    def refused(source: Any, target: Any, **options: Any) -> None:
        if Path(source) == place.work:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        rename(source, target, **options)

    with monkeypatch.context() as patched:
        patched.setattr(work_folder, "_exchange", lambda one, other: False)
        patched.setattr(os, "rename", refused)
        with pytest.raises(BuildError, match="Input/output error"):
            make(spoken_config, out, seed=2, overwrite=True)
        assert contents(out) == old
        assert not place.replaced.exists()
    make(spoken_config, out, seed=2, overwrite=True)
    assert verify.open_bundle(out).source.seed == 2


@pytest.mark.parametrize("left", [0, 100], ids=["emptied", "cut short"])
def test_a_finished_group_that_was_cut_short_is_written_again(
    spoken_config: ModelConfig, undisturbed: Path, tmp_path: Path, left: int
) -> None:
    """What a power failure may leave of a file that the journal counts as finished."""
    out = tmp_path / "b.bundle"

    def killed() -> None:
        after_groups(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        make(spoken_config, out)

    with in_child(killed) as child:
        assert wait(child) == -signal.SIGKILL
    place = work_folder.BuildPaths(out)
    whole = sorted(finished_files(place))
    os.truncate(place.work / whole[0], left)
    assert contents(make(spoken_config, out).path) == contents(undisturbed)


def test_sigint_leaves_a_build_that_goes_on(spoken_config: ModelConfig, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.bundle"

    def interrupted() -> None:
        after_groups(3, lambda: os.kill(os.getpid(), signal.SIGINT))
        recorder = Recorder()
        try:
            make(spoken_config, out, progress=recorder)
        finally:
            (tmp_path / "notes").write_text("\n".join(recorder.notes))

    with in_child(interrupted) as child:
        assert wait(child) == 3
    assert "the same command resumes" in (tmp_path / "notes").read_text()
    place = work_folder.BuildPaths(out)
    assert not out.exists()
    assert not place.lock.exists()
    assert finished_files(place)
    assert contents(make(spoken_config, out).path) == contents(undisturbed)


def test_no_space_in_the_middle(
    spoken_config: ModelConfig, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b.bundle"
    write, journal = write_weights._write_all, work_folder.BuildPaths(out).journal

    def full(handle: int, data: memoryview) -> None:
        if journal.is_file() and b"safetensors" in journal.read_bytes():  # a group is finished
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle, data)

    with monkeypatch.context() as patched:
        patched.setattr(write_weights, "_write_all", full)
        with pytest.raises(
            BuildError, match=r"No space left on device.*kept in .*\.b\.bundle\.building.*same command to resume"
        ):
            make(spoken_config, out)
    place = work_folder.BuildPaths(out)
    assert not out.exists()
    assert finished_files(place)
    assert not list(place.work.rglob("*.part"))
    assert contents(make(spoken_config, out).path) == contents(undisturbed)


@pytest.mark.slow
def test_no_space_in_the_calibration_of_a_build(
    spoken_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has finished is kept, as it says, and gone on with."""
    out, policy = tmp_path / "b.bundle", preset("fp8")
    append, counter = getattr(run, "append"), itertools.count()  # noqa: B009

    def full(file: Any, array: Any) -> None:
        if next(counter) == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, array)

    with monkeypatch.context() as patched:
        patched.setattr(run, "append", full)
        with pytest.raises(CalibrationError, match=r"No space left on device.*kept in .*\.b\.bundle\.calibrating"):
            make(spoken_config, out, policy=policy)
    recorder = Recorder()
    make(spoken_config, out, policy=policy, progress=recorder)
    assert any("resuming the interrupted calibration" in note for note in recorder.notes)
    whole = make(spoken_config, tmp_path / "whole.bundle", policy=policy)
    assert contents(out) == contents(whole.path)


def test_file_size_limit_of_the_system(spoken_config: ModelConfig, tmp_path: Path) -> None:
    """A limit that the kernel enforces, not a stand-in for one."""
    out = tmp_path / "b.bundle"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            make(spoken_config, out)
        except BuildError as error:
            os._exit(7 if "File too large" in str(error) else 8)

    with in_child(limited) as child:
        assert wait(child) == 7
    assert not out.exists()
    make(spoken_config, out)
    verify.open_bundle(out)


def test_too_little_space_is_said_before_anything_is_written(
    spoken_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("flamingo_export.pipeline.work_folder.shutil.disk_usage", lambda path: usage)
    with pytest.raises(BuildError, match=r"needs \d\d MiB .* has 0 MiB free"):
        make(spoken_config, tmp_path / "b.bundle")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_two_builds_to_one_path(spoken_config: ModelConfig, tmp_path: Path) -> None:
    out = tmp_path / "b.bundle"

    def slow() -> None:
        write_weights._write_all = lambda handle, data: time.sleep(60)
        make(spoken_config, out)

    with in_child(slow) as child:
        place = work_folder.BuildPaths(out)
        deadline = time.monotonic() + 20
        while not place.journal.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(BuildError, match=rf"another build to .*b\.bundle is running \(process {child}\)"):
            make(spoken_config, out)
        assert place.work.is_dir(), "the refused build must not touch the work of the other"
        os.kill(child, signal.SIGKILL)
        wait(child)
    make(spoken_config, out)  # the lock of a killed build binds nobody


@pytest.mark.parametrize("change", ["seed", "storage", "version", "no resume"])
def test_another_request_starts_anew(
    change: str, spoken_config: ModelConfig, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b.bundle"

    def killed() -> None:
        after_groups(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        make(spoken_config, out)

    with in_child(killed) as child:
        assert wait(child) == -signal.SIGKILL
    before = finished_files(work_folder.BuildPaths(out))
    assert before
    options: dict[str, Any] = {"progress": recorder}
    if change == "seed":
        options["seed"] = 6
    elif change == "storage":
        options["storage"] = "bf16"
    elif change == "no resume":
        options["resume"] = False
    else:
        monkeypatch.setattr("flamingo_export.pipeline.run.importlib.metadata.version", lambda tool: "9.9")
    make(spoken_config, out, **options)
    assert any("starting anew" in note for note in recorder.notes)
    inodes = {path.stat().st_mtime_ns for path in (out / "weights").iterdir()}
    assert not inodes & {mark[1] for mark in before.values()}
    verify.open_bundle(out)
