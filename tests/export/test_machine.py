"""Memory and cores within a container's limits, as the kernel lays its files out for both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from flamingo_export import machine

GIB = 1 << 30


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, 40 of them free, with 16 logical cores on 8 physical ones; its control groups below the folder returned."""
    memory = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def member(host: Path, *lines: str) -> None:
    (host.parent / "membership").write_text("".join(f"{line}\n" for line in lines))


def found() -> tuple[float, float, int, int]:
    return machine.total_memory() / GIB, machine.available_memory() / GIB, machine.usable_cores(), machine.physical_cores()


def test_without_groups_the_machine_is_what_there_is(host: Path) -> None:
    assert found() == (64, 40, 16, 8)


def test_version_2_in_a_container_that_sees_its_group_as_the_root(host: Path) -> None:
    member(host, "0::/")
    put(host, memory__max=8 * GIB, memory__current=5 * GIB, cpu__max="250000 100000")
    put(host, memory__stat=f"anon {2 * GIB}\nfile {3 * GIB}\ninactive_file {2 * GIB}\nactive_file {1 * GIB}")
    assert found() == (8, 6, 3, 3)  # the page cache is given up first; two and a half cores' time is worth three threads


def test_version_2_the_narrowest_of_all_groups_above_counts(host: Path) -> None:
    member(host, "0::/kubepods/pod1/box")
    put(host / "kubepods", memory__max="max", memory__high="max", memory__current=20 * GIB, cpu__max="max 100000")
    put(
        host / "kubepods" / "pod1",
        memory__max=12 * GIB,
        memory__high=10 * GIB,
        memory__current=4 * GIB,
        cpu__max="400000 100000",
    )
    put(host / "kubepods" / "pod1" / "box", memory__max=16 * GIB, memory__current=1 * GIB, cpu__max="50000 100000")
    assert found() == (10, 6, 1, 1)


def test_version_1_with_controllers_in_folders_of_their_own(host: Path) -> None:
    member(host, "12:cpu,cpuacct:/docker/abc", "4:memory:/docker/abc", "1:name=systemd:/docker/abc")
    put(host / "memory", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=30 * GIB)
    inside = host / "memory" / "docker" / "abc"
    put(inside, memory__limit_in_bytes=6 * GIB, memory__usage_in_bytes=5 * GIB)
    put(inside, memory__stat=f"cache {4 * GIB}\ntotal_inactive_file {3 * GIB}\ntotal_active_file {GIB // 2}")
    put(host / "cpu,cpuacct" / "docker" / "abc", cpu__cfs_quota_us=200000, cpu__cfs_period_us=100000)
    assert found() == (6, 4.5, 2, 2)


def test_version_1_in_a_container_that_sees_its_group_as_the_root(host: Path) -> None:
    member(host, "4:memory:/docker/abc", "3:cpu,cpuacct:/docker/abc")
    put(host / "memory", memory__limit_in_bytes=6 * GIB, memory__usage_in_bytes=2 * GIB)
    put(host / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert found() == (6, 4, 16, 8)


@pytest.mark.parametrize("text", ["", "max", "-1", "no number", "\xff"])
def test_what_cannot_be_read_is_no_limit(host: Path, text: str) -> None:
    member(host, "0::/../..", "nonsense", "5:memory")
    put(host, memory__max=text or "max", cpu__max=text, memory__current=text, memory__stat=text)
    if text != "-1":
        assert found() == (64, 40, 16, 8)


def test_more_used_than_the_limit_leaves_nothing(host: Path) -> None:
    member(host, "0::/")
    put(host, memory__max=GIB, memory__current=2 * GIB)
    assert machine.available_memory() == 0


def test_threads_of_a_session_follow_the_quota(host: Path) -> None:
    from flamingo_export.backends.base import SessionOptions
    from flamingo_export.backends.onnxruntime import session_options

    member(host, "0::/")
    put(host, cpu__max="200000 100000")
    assert session_options(SessionOptions(), None).intra_op_num_threads == 2
    assert session_options(SessionOptions(threads=5), None).intra_op_num_threads == 5


@pytest.mark.parametrize("home", ["", "here", "./here"])
def test_a_home_that_is_no_absolute_path_has_no_cache(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    assert machine.user_cache("verified") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert machine.user_cache("verified") == Path("/var/cache/flamingo-export/verified")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/")
    assert machine.user_cache("verified") == Path("/.cache/flamingo-export/verified")
