"""Freed memory goes back to the system by glibc's own function, and nothing happens where there is none."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from flamingo_export.backends import host_memory


@pytest.fixture(autouse=True)
def _looked_up_anew() -> Iterator[None]:
    host_memory._trim.cache_clear()
    yield
    host_memory._trim.cache_clear()


def test_all_of_it_is_given_back_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    kept: list[int] = []

    def library(name: object) -> SimpleNamespace:
        opened.append(name)
        return SimpleNamespace(malloc_trim=kept.append)

    monkeypatch.setattr(ctypes, "CDLL", library)
    host_memory.release()
    host_memory.release()
    assert kept == [0, 0]  # bytes to keep
    assert opened == [None]  # this process itself, asked once


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_a_library_that_cannot_be_asked(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def library(name: object) -> None:
        raise error("no library without a name")

    monkeypatch.setattr(ctypes, "CDLL", library)
    host_memory.release()


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    host_memory.release()
