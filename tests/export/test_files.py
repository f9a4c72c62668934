"""files.py: readers see all of a file or nothing, locks bind one process at a time, a full disk has one text."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from flamingo_export import files
from flamingo_export.errors import BuildError, CalibrationError


class Content(files.Identified, kw_only=True):
    count: int = 0


def test_a_file_is_replaced_whole_and_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.json"
    before = os.umask(0o027)
    try:
        files.write_atomically(path, b"old")
        files.write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_what_fails_on_the_way_leaves_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with files.replacing(path) as file:
            file.write(b"new")
            if failing == "write":
                fail()

    if failing != "write":
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left") as raised:
        write()
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_many_threads_may_write_to_one_path(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.json", [bytes([65 + n]) * 50_000 for n in range(8)]
    threads = [threading.Thread(target=files.write_atomically, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in texts
    assert len(list(tmp_path.iterdir())) == 1


def test_a_lock_binds_one_at_a_time_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"

    def busy(holder: str) -> BuildError:
        return BuildError(f"held by {holder}")

    def unwritable(error: OSError) -> BuildError:
        return BuildError(f"unwritable: {error.strerror}")

    with files.exclusive(path, busy=busy, unwritable=unwritable):
        with pytest.raises(BuildError, match=f"held by {os.getpid()}"), files.exclusive(path, busy=busy, unwritable=unwritable):
            pass
        assert path.exists()
    assert not path.exists()
    with files.exclusive(path, busy=busy, unwritable=unwritable):  # it can be taken again
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(BuildError, match="unwritable: "),
        files.exclusive(tmp_path / "file" / "lock", busy=busy, unwritable=unwritable),
    ):
        pass


def test_a_lock_that_a_full_disk_does_not_take_is_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")  # as the system does, without a name

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(BuildError, match=r"^unwritable: full$"),
        files.exclusive(
            tmp_path / "lock",
            busy=lambda _: BuildError("busy"),
            unwritable=lambda error: BuildError(f"unwritable: {error.strerror}"),
        ),
    ):
        pytest.fail("the work began without a lock")
    assert list(tmp_path.iterdir()) == []


def test_what_the_block_raises_passes_a_lock_unchanged(tmp_path: Path) -> None:
    """An error of the work is not mistaken for one of the lock."""
    with (
        pytest.raises(BlockingIOError),
        files.exclusive(tmp_path / "lock", busy=lambda _: BuildError("busy"), unwritable=lambda _: BuildError("unwritable")),
    ):
        raise BlockingIOError


@pytest.mark.parametrize("error_class", [BuildError, CalibrationError])
def test_a_full_disk_is_named_with_what_is_kept(tmp_path: Path, error_class: type[BuildError]) -> None:
    with (
        pytest.raises(
            error_class, match=r"writing /x/a failed: full\. The parts that are finished are kept in .*run the same command"
        ),
        files.disk_errors(tmp_path, error_class),
    ):
        raise OSError(errno.ENOSPC, "full", "/x/a")
    (tmp_path / "b").touch()
    with (
        pytest.raises(error_class, match=r"writing .*/b failed: full\..* kept in .*/b\. .*, or remove that file\.$"),
        files.disk_errors(tmp_path / "b", error_class),
    ):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(PermissionError), files.disk_errors(tmp_path, error_class):
        raise PermissionError(errno.EACCES, "denied")


def test_a_journal_gives_back_what_was_saved_and_nothing_broken(tmp_path: Path) -> None:
    journal = files.Journal(tmp_path / "journal.json", Content)
    assert journal.read() is None
    journal.save(Content(identity="a", count=3))
    assert journal.read() == Content(identity="a", count=3)
    for text in (b"{", b'{"count": 3}', b"[]"):
        journal.path.write_bytes(text)
        assert journal.read() is None
    (tmp_path / ".journal.json.part").write_bytes(b"what a killed process left")
    journal.save(Content(identity="a"))
    assert [each.name for each in tmp_path.iterdir()] == ["journal.json"]
    journal.remove()
    assert not journal.path.exists()
