"""The models that a server serves: by name, opened once, exchanged while requests run."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from flamingo_export.errors import FlamingoExportError, InputError
from flamingo_export.runtime.model import Model
from flamingo_export.serve.refusals import ApiError
from flamingo_export.serve.settings import ModelChoice

_FAILURES = 3
"""Failures of a backend, one after the other, after which a model counts as broken."""
_log = logging.getLogger("flamingo_export.serve")


def named(bundles: Sequence[ModelChoice]) -> dict[str, ModelChoice]:
    """The choices by name. Raises InputError for none, or a name that stands for two."""
    if not bundles:
        raise InputError("no bundle was named. Give one: flamingo-export serve my.bundle")
    found: dict[str, ModelChoice] = {}
    for choice in bundles:
        if choice.name in found:
            raise InputError(
                f"{found[choice.name].bundle} and {choice.bundle} would both be called {choice.name!r}. Name one: --name other={choice.bundle}"
            )
        found[choice.name] = choice
    return found


class Served:
    """One opened bundle. It is closed once it has been replaced and its last request has ended."""

    def __init__(self, name: str, model: Model) -> None:
        self.name, self.model = name, model
        self.created = int(time.time())
        self._active = 0
        self._retired = False
        self._failures = 0
        self._lock = threading.Lock()

    @property
    def healthy(self) -> bool:
        """Whether its backend has neither failed several times in a row nor lost its device."""
        return self._failures < _FAILURES and self.model.engine.lost is None

    @property
    def active(self) -> int:
        """Requests that use it."""
        return self._active

    @contextmanager
    def used(self) -> Iterator[Model]:
        """Keeps it open for the length of a `with` block."""
        with self._lock:
            if self._retired:
                raise ApiError(503, "The model is being exchanged. Try again.", code="unavailable", retry=True)
            self._active += 1
        try:
            yield self.model
        finally:
            self._let_go()

    def succeeded(self) -> None:
        """A request went well."""
        self._failures = 0

    def failed(self) -> None:
        """The backend failed on a request."""
        self._failures += 1

    def retire(self) -> None:
        """Closes it as soon as nobody uses it."""
        with self._lock:
            self._retired = True
            idle = self._active == 0
        if idle:
            self.model.close()

    def _let_go(self) -> None:
        with self._lock:
            self._active -= 1
            last = self._retired and self._active == 0
        if last:
            threading.Thread(target=self.model.close, name="close a replaced model", daemon=True).start()


class Models:
    """All models by name."""

    def __init__(self, choices: Sequence[ModelChoice], load: Callable[[ModelChoice], Model]) -> None:
        """Opens every bundle. load: opens one. Raises what it raises, and InputError for names that clash."""
        self._choices, self._load = named(choices), load
        self._served: dict[str, Served] = {}
        self._reloading = asyncio.Lock()
        try:
            for choice in self._choices.values():
                self._served[choice.name] = Served(choice.name, load(choice))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._served.values()))

    def find(self, name: str) -> Served:
        """The model of this name. Raises ApiError 404."""
        found = self._served.get(name)
        if found is None:
            raise ApiError(
                404,
                f"There is no model {name!r} here. There are {', '.join(self._served)}.",
                param="model",
                code="model_not_found",
            )
        return found

    @property
    def ready(self) -> bool:
        """Whether all of them can answer."""
        return all(served.healthy for served in self)

    async def reload(self) -> None:
        """Opens each bundle again where it has been exchanged or its model is broken. What runs ends on the old one; a bundle that cannot
        be opened leaves the old one where it is."""
        async with self._reloading:
            for name, choice in self._choices.items():
                old = self._served[name]
                try:
                    if old.healthy and not await asyncio.to_thread(_exchanged, choice, old.model):
                        continue
                    new = await asyncio.to_thread(self._load, choice)
                except FlamingoExportError as error:
                    _log.error("the bundle of %s cannot be opened, the old one stays in use: %s", name, error)
                    continue
                self._served[name] = Served(name, new)
                old.retire()
                _log.info("the bundle of %s was exchanged", name)

    def close(self) -> None:
        """Closes all of them; what runs fails."""
        for served in self:
            served.model.close()


def _exchanged(choice: ModelChoice, model: Model) -> bool:
    from flamingo_export.bundle.manifest import read_manifest

    return read_manifest(choice.bundle) != model.manifest
