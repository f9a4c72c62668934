"""The registry names every backend once; what repeats its names for a fast command line or for type checkers says the same."""

from __future__ import annotations

from typing import get_args

import pytest

from flamingo_export.backends.registry import _BACKENDS, BACKEND_NAMES, COMPILERS, PREFERRED, _load, get_compiler
from flamingo_export.cli import build, common_options
from flamingo_export.pipeline.build_request import BuildBackend

BUILT_FOR = ("onnxruntime", *COMPILERS)


def test_the_command_line_offers_every_backend() -> None:
    assert set(common_options._BACKENDS("")) == {"auto", *BACKEND_NAMES} - {"reference"}
    assert {choice.value for choice in build.Compiler} == set(BUILT_FOR)


def test_a_build_takes_every_compiler() -> None:
    assert set(get_args(BuildBackend)) == set(BUILT_FOR)


def test_auto_tries_every_backend_but_the_reference() -> None:
    assert set(PREFERRED) == set(BACKEND_NAMES) - {"reference"}
    assert not set(_BACKENDS) & set(COMPILERS)


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_every_row_makes_a_backend_of_its_name(name: str) -> None:
    assert _load(name).name == name


@pytest.mark.parametrize("name", COMPILERS)
def test_every_compiler_is_made_for_a_target(name: str) -> None:
    assert get_compiler(name, target="sm89").name == name
