"""`/v1/completions` with `echo`: a prompt with the log-probabilities of its own tokens, as evaluation harnesses ask for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.steering import cut_at
from flamingo_export.runtime.ticket import Ticket
from flamingo_export.serve.answers import Form, usage
from flamingo_export.serve.bodies import Completion
from flamingo_export.serve.body_options import options_of
from flamingo_export.serve.call import Asked, Call, cancel, request_of, result, watched
from flamingo_export.serve.chat_messages import MediumUrl
from flamingo_export.serve.refusals import ApiError
from flamingo_export.serve.transport import unless_gone


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Echo:
    """A prompt that is scored, and what follows it where tokens are wanted. begin: the first position that is scored."""

    ids: list[int]
    begin: int
    scored: Ticket[list[list[float]]] | None = None
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    following: Ticket[Outcome] | None = None

    @property
    def tickets(self) -> list[Ticket[Any] | None]:
        """What may be given up."""
        return [self.scored, self.following]


async def echoed(
    call: Call, body: Completion, prompts: Sequence[tuple[str | list[int], tuple[MediumUrl, ...]]], form: Form
) -> Any:
    """The prompts with their tokens' log-probabilities, and what follows them. Raises ApiError."""
    wanted = body.max_tokens or 0
    if wanted and (body.n or 1) > 1:
        raise ApiError(400, "echo goes with one text", param="n")
    options = options_of(body, wanted, body.logprobs) if wanted else None
    deadline = call.deadline(body.timeout)
    model = call.model

    def submit() -> list[_Echo]:
        found: list[_Echo] = []
        try:
            for prompt, media in prompts:
                whole = model.prepare(request_of(call, Asked(prompt=prompt, media=media)))
                ids = whole.token_ids.tolist()
                # What follows the last image, and the tags around it, is scored; before it a token is a condition. So is one without a logit.
                never, size = model.config.tokens.never, model.config.language_model.vocab_size
                tags = [place for place, token in enumerate(ids) if token in never or token >= size]
                begin = tags[-1] + 1 if tags else 1
                scored, likeliest = None, list[list[tuple[int, float]]]()
                if begin < len(ids):
                    head = dataclasses.replace(
                        whole,
                        token_ids=whole.token_ids[:begin],
                        phi=whole.phi[:begin],
                        keys=whole.keys[:begin],
                        first=None if whole.first is None else whole.first[:begin],
                    )
                    scored = model.engine.submit_score(
                        head, [ids[begin:]], caller=call.caller, deadline=deadline, likeliest=likeliest
                    )
                found.append(_Echo(ids=ids, begin=begin, scored=scored, likeliest=likeliest))
                if options is not None:
                    following = model.engine.submit(whole, options, caller=call.caller, deadline=deadline)
                    found[-1] = dataclasses.replace(found[-1], following=following)
        except BaseException:
            cancel([ticket for each in found for ticket in each.tickets])
            raise
        return found

    with call.closing, watched(call):
        preparing = call.server.prepared(
            call.served, submit, lambda echoes: cancel([ticket for each in echoes for ticket in each.tickets])
        )
        submitted = await unless_gone(call.receive, preparing)
        choices, prompt_tokens, new_tokens = [], 0, 0
        try:
            for index, echo in enumerate(submitted):
                values = (await unless_gone(call.receive, result(echo.scored)))[0] if echo.scored is not None else []
                ids, logprobs, reason = list(echo.ids), [None] * echo.begin + list(values), "length"
                top = [()] * echo.begin + _with_own(echo, values) if body.logprobs else []
                prompt_tokens += len(ids)
                if echo.following is not None and options is not None:
                    outcome = await unless_gone(call.receive, result(echo.following))
                    new = model.generation(outcome, options, echo.following.timings)
                    ids += new.token_ids
                    logprobs += new.token_logprobs
                    top += new.top_logprobs if body.logprobs else ()
                    new_tokens += len(new.token_ids)
                    reason = "stop" if new.finished else "length"
                found = form.logprobs_of(ids, logprobs, top)
                text, before = form.text(ids), len(form.text(echo.ids))
                if options is not None:  # a stop text in the prompt ends nothing
                    text = text[:before] + cut_at(text[before:], options.stops)
                choices.append({"index": index, "text": text, "logprobs": found, "finish_reason": reason})
        finally:
            cancel([ticket for each in submitted for ticket in each.tickets])
        call.served.succeeded()
        return form.whole(choices, usage(prompt_tokens, 0, new_tokens), {})


def _with_own(echo: _Echo, values: Sequence[float]) -> list[Any]:
    """At each scored place of a prompt the likeliest token and the prompt's own, as OpenAI's interface has them."""
    likeliest = echo.likeliest[0] if echo.likeliest else []
    own = zip(echo.ids[echo.begin :], values, strict=True)
    return [tuple(dict([best, mine]).items()) for best, mine in zip(likeliest, own, strict=True)]
