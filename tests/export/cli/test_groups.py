"""Groups of options: shown one by one where the group stands, given to the verb as one value."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import typer

from flamingo_export.cli.groups import Beside, Quantised, Running, with_groups


def verb(name: str, quantised: Quantised = Quantised(), run: Running = Running()) -> None:
    seen.append((name, quantised, run))


seen: list[tuple[str, Quantised, Running]] = []


def test_a_group_is_shown_as_its_options_in_its_place() -> None:
    names = list(inspect.signature(with_groups(verb)).parameters)
    assert names == ["name", "fp8", "int8", "int4", "policy", "backend", "fallback", "device", "threads"]


def test_the_verb_gets_what_was_typed() -> None:
    single = typer.Typer()
    single.command()(with_groups(verb))
    with pytest.raises(SystemExit) as done:
        single(["a", "--int8", "--threads", "3"])
    assert done.value.code == 0
    assert seen.pop() == ("a", Quantised(int8=True), Running(threads=3))


def test_nothing_beside_a_checkpoint_is_false() -> None:
    assert not Beside()
    assert not Beside(loras=[])
    assert Beside(vision=Path("v"))


def test_two_precisions_exclude_each_other() -> None:
    assert Quantised().chosen() is None
    chosen = Quantised(int4=True).chosen()
    assert chosen is not None
    assert chosen.name == "int4"
    with pytest.raises(typer.BadParameter, match="--fp8 and --int4 exclude each other"):
        Quantised(fp8=True, int4=True).chosen()
