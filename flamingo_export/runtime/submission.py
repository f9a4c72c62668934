"""Requests of one call handed to the engine, all or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.jobs import Group
from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Prepared, Request
from flamingo_export.runtime.ticket import Ticket, now
from flamingo_export.runtime.timings import Timings


def submit_all(
    engine: Engine,
    requests: Sequence[tuple[Request, Prepared]],
    options: GenerateOptions,
    batch_size: int,
    *,
    caller: str,
    timeout: float | None,
    wake: bool,
    events: bool,
    seconds: float,
) -> list[Ticket[Outcome]]:
    """A ticket for each request, of which batch_size run at a time. If one is refused, those before it are given up.

    seconds: that preparing each took. Other parameters and errors: as `Engine.submit` has them.
    """
    group = Group(batch_size) if len(requests) > 1 else None
    tickets: list[Ticket[Outcome]] = []
    try:
        for request, ready in requests:
            ticket = engine.submit(
                ready,
                options if request.seed is None else replace(options, seed=request.seed),
                caller=caller,
                deadline=deadline_of(timeout),
                events=events,
                wake=wake,
                group=group,
                timings=Timings(prepare=seconds),
            )
            tickets.append(ticket)
    except BaseException:
        cancel_all(tickets)
        raise
    return tickets


def cancel_all(tickets: Sequence[Ticket[Any]]) -> None:
    """Gives requests up and frees their rows."""
    for ticket in tickets:
        ticket.cancel()


def deadline_of(timeout: float | None) -> float | None:
    """When a request that may take `timeout` seconds is given up, by the engine's clock."""
    return None if timeout is None else now() + timeout
