"""Models of a server: opened together, exchanged while requests run, closed once nobody uses them. The models are stand-ins."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from flamingo_export.bundle.manifest import MANIFEST_NAME, read_manifest, write_manifest
from flamingo_export.errors import BundleError
from flamingo_export.serve.models import Models
from flamingo_export.serve.refusals import ApiError
from flamingo_export.serve.settings import ModelChoice


class StandIn:
    """What the server holds of a model."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = read_manifest(bundle)
        self.engine = SimpleNamespace(lost=None)
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Opening:
    """Opens stand-ins and counts them; `fails` names bundles that cannot be opened."""

    def __init__(self) -> None:
        self.opened: list[Any] = []
        self.fails: set[str] = set()

    def __call__(self, choice: ModelChoice) -> Any:
        if choice.name in self.fails:
            raise BundleError(f"{choice.bundle} is damaged")
        self.opened.append(StandIn(choice.bundle))
        return self.opened[-1]


@pytest.fixture
def choice(nano_bundle: Path, tmp_path: Path) -> ModelChoice:
    """The manifest of nano in a folder of its own."""
    bundle = tmp_path / "nano.bundle"
    bundle.mkdir()
    shutil.copyfile(nano_bundle / MANIFEST_NAME, bundle / MANIFEST_NAME)
    return ModelChoice(name="nano", bundle=bundle)


@pytest.fixture
def opening() -> Opening:
    return Opening()


def current(models: Models) -> Any:
    """The model that new requests are given."""
    return models.find("nano").model


def exchange(bundle: Path) -> None:
    """Puts another bundle in its place: other weights by its manifest."""
    manifest = read_manifest(bundle)
    write_manifest(bundle, msgspec.structs.replace(manifest, source=msgspec.structs.replace(manifest.source, sha256="1" * 64)))


def test_what_was_not_exchanged_stays_open(choice: ModelChoice, opening: Opening) -> None:
    models = Models([choice], opening)
    before = models.find("nano")
    asyncio.run(models.reload())
    assert models.find("nano") is before
    assert len(opening.opened) == 1
    assert not opening.opened[0].closed.is_set()


def test_an_exchanged_bundle_takes_the_place_of_an_idle_one(
    choice: ModelChoice, opening: Opening, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models([choice], opening)
    exchange(choice.bundle)
    with caplog.at_level(logging.INFO, logger="flamingo_export.serve"):
        asyncio.run(models.reload())
    old, new = opening.opened
    assert current(models) is new
    assert [served.name for served in models] == ["nano"]
    assert new.manifest.source.sha256 == "1" * 64
    assert old.closed.is_set()
    assert not new.closed.is_set()
    assert "the bundle of nano was exchanged" in caplog.text


def test_a_replaced_model_is_closed_when_its_last_request_has_ended(choice: ModelChoice, opening: Opening) -> None:
    models = Models([choice], opening)
    served = models.find("nano")
    with served.used() as given, served.used():
        model: Any = given
        assert model is opening.opened[0]
        exchange(choice.bundle)
        asyncio.run(models.reload())
        assert current(models) is opening.opened[1]
        assert served.active == 2
        with pytest.raises(ApiError) as refused, served.used():  # one that found it before it was replaced
            pass
        assert (refused.value.status, refused.value.code, refused.value.retry) == (503, "unavailable", True)
        assert not opening.opened[0].closed.is_set()
    assert opening.opened[0].closed.wait(20)
    assert served.active == 0


def test_a_broken_model_is_opened_again(choice: ModelChoice, opening: Opening) -> None:
    models = Models([choice], opening)
    for number in range(3):
        assert models.ready == (number < 3)
        models.find("nano").failed()
    assert not models.ready
    asyncio.run(models.reload())
    assert models.ready
    assert len(opening.opened) == 2
    assert opening.opened[0].closed.is_set()


def test_a_bundle_that_cannot_be_opened_leaves_the_old_one(
    choice: ModelChoice, opening: Opening, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models([choice], opening)
    before = models.find("nano")
    exchange(choice.bundle)
    opening.fails.add("nano")
    asyncio.run(models.reload())
    assert "the bundle of nano cannot be opened, the old one stays in use" in caplog.text
    assert f"{choice.bundle} is damaged" in caplog.text
    shutil.rmtree(choice.bundle)
    asyncio.run(models.reload())
    assert models.find("nano") is before
    assert not opening.opened[0].closed.is_set()
    with before.used():
        pass


def test_one_that_fails_at_the_start_closes_those_before_it(choice: ModelChoice, opening: Opening) -> None:
    opening.fails.add("other")
    with pytest.raises(BundleError, match="is damaged"):
        Models([choice, ModelChoice(name="other", bundle=choice.bundle)], opening)
    assert [model.closed.is_set() for model in opening.opened] == [True]
