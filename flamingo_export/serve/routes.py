"""What each path does with a request: read, check, hand to the engine, answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Any

from flamingo_export.errors import FlamingoExportError
from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Prepared
from flamingo_export.runtime.texts import Generation, Text
from flamingo_export.runtime.ticket import Ticket
from flamingo_export.runtime.timings import Timings
from flamingo_export.serve.answers import DONE, Form, Pieces, event, extras, usage
from flamingo_export.serve.bodies import Chat, Completion, Sampled, Scored
from flamingo_export.serve.body_options import check_offered, options_of
from flamingo_export.serve.call import Asked, Call, cancel, request_of, result, watched
from flamingo_export.serve.chat_messages import ChatPrompt, MediumUrl, chat_prompt
from flamingo_export.serve.echo import echoed
from flamingo_export.serve.refusals import ApiError
from flamingo_export.serve.transport import EventStream, unless_gone


async def chat(call: Call, body: Chat) -> Any:
    """POST /v1/chat/completions."""
    check_offered(body)
    prompt = chat_prompt(body.messages, body.shots, call.model.inputs, body.date)
    _check_media(call, prompt.media)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    options = options_of(body, most, body.top_logprobs)
    form = Form(
        kind="chat", model=call.served.name, tokenizer=_tokenizer(call.model), logprobs=bool(body.logprobs), stops=options.stops
    )
    return await _generate(call, body, [prompt], options, form)


async def completions(call: Call, body: Completion) -> Any:
    """POST /v1/completions."""
    if body.suffix:
        raise ApiError(400, "suffix is not offered.", param="suffix", code="unsupported")
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of is not offered; ask for beams.", param="best_of", code="unsupported")
    media = tuple(MediumUrl(url) for url in body.images)
    _check_media(call, media)
    prompts = _prompts(body.prompt)
    if len(prompts) > 1 and media:
        raise ApiError(400, "several prompts have no images; send one request for each", param="images")
    jobs = len(prompts) * (2 if body.echo and body.max_tokens else 1)  # an echo is scored, and what follows it generated
    most = call.model.engine.rows + call.server.settings.max_queue
    if len(prompts) > 1 and jobs > most:
        raise ApiError(
            400,
            f"the {len(prompts)} prompts are {jobs} requests, and this server runs and keeps {most} at most. Send fewer at a time.",
            param="prompt",
        )
    if body.stream and (len(prompts) > 1 or body.echo):
        raise ApiError(400, "a stream answers one prompt, without echo", param="stream")
    form = Form(kind="completion", model=call.served.name, tokenizer=_tokenizer(call.model), logprobs=body.logprobs is not None)
    if body.echo:
        return await echoed(call, body, [(prompt, media) for prompt in prompts], form)
    asked = [Asked(prompt=prompt, media=media) for prompt in prompts]
    options = options_of(body, body.max_tokens, body.logprobs)
    form.stops = options.stops
    return await _generate(call, body, asked, options, form)


async def score(call: Call, body: Scored) -> Any:
    """POST /v1/score."""
    if not body.candidates:
        raise ApiError(400, "candidates is empty", param="candidates")
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.messages is not None:
        if body.images:
            raise ApiError(400, "images go into the messages", param="images")
        prompt: Asked | ChatPrompt = chat_prompt(body.messages, body.shots, call.model.inputs)
    else:
        prompt = Asked(prompt=body.prompt or "", media=tuple(MediumUrl(url) for url in body.images))
    media = prompt.media
    _check_media(call, media)
    deadline = call.deadline(body.timeout)

    def submit() -> tuple[Ticket[list[list[float]]], int]:
        request = request_of(call, prompt)
        model = call.model
        prepared = model.prepare(request)
        ids = [model.candidate_ids(request, candidate, body.end) for candidate in body.candidates]
        return model.engine.submit_score(prepared, ids, caller=call.caller, deadline=deadline), len(prepared.token_ids)

    with call.closing, watched(call):
        preparing = call.server.prepared(call.served, submit, lambda submitted: submitted[0].cancel())
        ticket, length = await unless_gone(call.receive, preparing)
        try:
            found = await unless_gone(call.receive, result(ticket))
        except BaseException:
            ticket.cancel()
            raise
        call.served.succeeded()
        scores = [
            {"index": index, "candidate": candidate, "logprob": sum(values), "token_logprobs": values}
            for index, (candidate, values) in enumerate(zip(body.candidates, found, strict=True))
        ]
        tokens = sum(map(len, found))
        return {"object": "score", "model": call.served.name, "scores": scores, "usage": usage(length, 0, tokens)}


async def _generate(
    call: Call, body: Sampled, prompts: Sequence[Asked | ChatPrompt], options: GenerateOptions, form: Form
) -> Any:
    deadline = call.deadline(body.timeout)
    model = call.model
    options.check(model.config)

    def submit() -> list[tuple[Ticket[Outcome], Prepared]]:
        found: list[tuple[Ticket[Outcome], Prepared]] = []
        try:
            for prompt in prompts:
                started = time.perf_counter()
                prepared = model.prepare(request_of(call, prompt))
                timings = Timings(prepare=time.perf_counter() - started)
                ticket = model.engine.submit(
                    prepared, options, caller=call.caller, deadline=deadline, events=body.stream, timings=timings
                )
                found.append((ticket, prepared))
        except BaseException:
            cancel([ticket for ticket, _ in found])
            raise
        return found

    with ExitStack() as failed:
        failed.push(call.closing)
        with watched(call):
            preparing = call.server.prepared(call.served, submit, lambda pairs: cancel([ticket for ticket, _ in pairs]))
            submitted = await unless_gone(call.receive, preparing)
        if body.stream:
            failed.pop_all()
            (ticket, prepared), include = submitted[0], bool(body.stream_options and body.stream_options.include_usage)
            call.closing.callback(ticket.cancel)
            events = _stream(call, ticket, prepared, options, form, include)
            seconds = call.server.settings.body_seconds
            return EventStream(events, call.closing, {"x-request-id": call.request_id}, seconds=seconds)
        with watched(call):
            try:
                found = await unless_gone(
                    call.receive, asyncio.gather(*(_finished(model, pair[0], options) for pair in submitted))
                )
            finally:
                cancel([ticket for ticket, _ in submitted])
        choices: list[dict[str, Any]] = []
        completion = prompt_tokens = reused = 0
        for generation, (_, prepared) in zip(found, submitted, strict=True):
            texts = (generation, *generation.alternatives)
            choices += [form.choice(len(choices) + index, text) for index, text in enumerate(texts)]
            completion += sum(len(text.token_ids) for text in texts)
            prompt_tokens += len(prepared.token_ids)
            reused += generation.timings.reused_tokens
            call.server.observe(call.served, generation.timings)
        call.served.succeeded()
        extra = extras(found[0], submitted[0][1])
        return form.whole(choices, usage(prompt_tokens, reused, completion), extra)


async def _stream(
    call: Call, ticket: Ticket[Outcome], prepared: Prepared, options: GenerateOptions, form: Form, include_usage: bool
) -> AsyncIterator[bytes]:
    """Events until the end. A failure after the first one is an event too, since the status has been sent."""
    pieces = [Pieces(form, index) for index in range(options.num_return)]
    try:
        for each in pieces:
            for chunk in each.first():
                yield event(chunk)
        async for tokens in ticket:
            for chunk in pieces[tokens.index].push(tokens):
                yield event(chunk)
        outcome = await ticket
        found = call.model.generation(outcome, options, ticket.timings)
    except FlamingoExportError as error:
        yield event(call.server.refusal(call.served, call.request_id, error).body())
        yield DONE
        return
    except asyncio.CancelledError:
        raise
    except Exception as error:
        yield event(call.server.fault(call.served, call.request_id, error).body())
        yield DONE
        return
    call.served.succeeded()
    call.server.observe(call.served, ticket.timings)
    texts = _in_stream_order(pieces, found)
    for index, text in sorted(texts.items()):
        for chunk in pieces[index].finish(text):
            yield event(chunk)
    if include_usage:
        count = usage(
            len(prepared.token_ids), ticket.timings.reused_tokens, sum(len(text.token_ids) for text in texts.values())
        )
        yield event({**form.head(True), "choices": [], "usage": count, "flamingo": extras(found, prepared)})
    yield DONE


def _in_stream_order(pieces: Sequence[Pieces], found: Generation) -> dict[int, Text]:
    """The texts, which come best first, by the number under which the stream began them: samples have an index of their own. There may be
    fewer than were asked for, where the form of the answer allows no more."""
    left: list[Text] = [found, *found.alternatives]
    chosen: dict[int, Text] = {}
    # Those that have given out the most tokens fit the fewest texts.
    for index in sorted(range(len(pieces)), key=lambda index: -pieces[index].given):
        text = next((text for text in left if pieces[index].is_of(text)), None)
        if text is not None:
            left.remove(text)
            chosen[index] = text
    return chosen


async def _finished(model: Model, ticket: Ticket[Outcome], options: GenerateOptions) -> Generation:
    return model.generation(await ticket, options, ticket.timings)


def _check_media(call: Call, media: Sequence[MediumUrl]) -> None:
    """What can be refused without fetching or decoding anything."""
    most = min(call.server.settings.max_media, call.model.manifest.limits.bank_rows)
    if len(media) > most:
        raise ApiError(
            400, f"{len(media)} images and videos were sent, at most {most} are taken", param="messages", code="too_many_media"
        )
    for medium in media:
        call.server.fetcher.check(medium.url)


def _prompts(given: str | list[int | str | list[int]]) -> list[str | list[int]]:
    """One or several prompts, each as text or token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, "prompt is empty", param="prompt")
    ids = [item for item in given if isinstance(item, int)]
    if len(ids) == len(given):
        return [ids]
    found = [item for item in given if not isinstance(item, int)]
    if len(found) < len(given) or len({type(item) for item in found}) > 1:
        raise ApiError(400, "prompt mixes texts and token ids", param="prompt")
    return found


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise ApiError(400, "this model's bundle has no tokenizer, so it cannot be asked in text", code="no_tokenizer")
    return model.tokenizer
