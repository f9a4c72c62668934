"""A request on its way through a route, and what routes have in common: media, tickets, failures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from flamingo_export.errors import FlamingoExportError
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.ticket import Ticket, now
from flamingo_export.runtime.videos import Video
from flamingo_export.serve.body_options import seconds_of
from flamingo_export.serve.chat_messages import ChatPrompt, MediumUrl
from flamingo_export.serve.models import Served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Receive

    from flamingo_export.serve.app import Server


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A request on its way through a route."""

    server: Server
    served: Served
    caller: str
    request_id: str
    receive: Receive
    closing: ExitStack
    """Closed by who answers: at once, or at the end of a stream."""

    @property
    def model(self) -> Model:
        """The model it asks."""
        return self.served.model

    def deadline(self, timeout: float | None) -> float:
        """On the engine's clock. Raises ApiError for a deadline in the past."""
        most = self.server.settings.timeout
        return now() + min(most, seconds_of(timeout, most))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A raw prompt, as text or token ids, and the media of its tags."""

    prompt: str | list[int]
    media: tuple[MediumUrl, ...] = ()


def cancel(tickets: Sequence[Ticket[Any] | None]) -> None:
    """Gives up those that have not ended."""
    for ticket in tickets:
        if ticket is not None:
            ticket.cancel()


async def result(ticket: Ticket[Any]) -> Any:
    """What comes of it, as a coroutine. Raises what its request failed with."""
    return await ticket


@contextmanager
def watched(call: Call) -> Iterator[None]:
    """Failures of ours as refusals; anything else is the server's fault, logged with the request's id and not shown."""
    try:
        yield
    except FlamingoExportError as error:
        raise call.server.refusal(call.served, call.request_id, error) from error


def request_of(call: Call, prompt: Asked | ChatPrompt) -> Request:
    """What the model is asked, media fetched. Blocking."""
    media = [_medium(call, medium) for medium in prompt.media]
    if isinstance(prompt, ChatPrompt):
        return Request(prompt=prompt.text, media=media, quoted=prompt.quoted, forms=call.model.inputs.prompts)
    return Request(prompt=prompt.prompt, media=media)


def _medium(call: Call, medium: MediumUrl) -> Any:
    found = call.server.fetcher.get(medium.url)
    return Video(source=found, num_frames=medium.frames) if medium.video else found
