"""A loaded bundle: text in, text out."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack, overload

import numpy as np

from flamingo_export.backends.base import Backend, SessionOptions
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.errors import InputError
from flamingo_export.runtime.arguments import Batch, Prompt, as_request, candidate_ids, listed
from flamingo_export.runtime.chat import chat_prompt
from flamingo_export.runtime.chat_template import DAY
from flamingo_export.runtime.constraints import Forms
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.images import ImageSource
from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.media import Medium, MediumSource, RecentMedia
from flamingo_export.runtime.options import GenerateOptions, Settings, options_from
from flamingo_export.runtime.prompts import Shots, as_shots, caption_prompt, qa_prompt
from flamingo_export.runtime.request import Prepared, Request, prepare
from flamingo_export.runtime.search import Hypothesis
from flamingo_export.runtime.steering import cut_at
from flamingo_export.runtime.stream import Stream
from flamingo_export.runtime.subgraphs import Engines
from flamingo_export.runtime.submission import cancel_all, deadline_of, submit_all
from flamingo_export.runtime.texts import Generation, Score, Text
from flamingo_export.runtime.ticket import Ticket
from flamingo_export.runtime.timings import Timings
from flamingo_export.runtime.tokenizer import TOKENIZER_FILE, TextStream, Tokenizer
from flamingo_export.runtime.videos import Video, VideoSource

_OWN_NAMES = ("images", "videos", "caller", "timeout", "batch_size")


class Model:
    """A bundle ready to generate. Close it, or use it in a `with` block, to free its memory.

    From any thread and any event loop: requests of all callers share the steps of one engine, whose answers do not depend on neighbours.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: Backend,
        options: SessionOptions,
        *,
        rows: int | None = None,
        queue: int | None = None,
    ) -> None:
        """Opens the graphs.

        rows: requests that run at once; None: 16, or as many as the engines were built for.
        queue: requests that may wait beside them; None: any number.
        Raises BackendError or BundleError, InputError for more rows than the engines take.
        """
        self.bundle, self.manifest, self.backend = bundle, manifest, backend
        self.config = manifest.config
        self.threads = options.threads
        self.inputs = manifest.inputs
        self._recent = RecentMedia(manifest.limits.bank_rows)
        has_tokenizer = (bundle / TOKENIZER_FILE).is_file()
        self.tokenizer = Tokenizer.open(bundle, self.config, self.inputs.tags) if has_tokenizer else None
        self.engines = Engines.open(bundle, manifest, backend, options)
        try:
            decode = None if self.tokenizer is None else self.tokenizer.decode
            forms = None if self.tokenizer is None else Forms(self.tokenizer.to_json, self.config)
            self.engine = Engine(self.engines, self.config, manifest.limits, rows=rows, queue=queue, decode=decode, forms=forms)
        except BaseException:
            self.engines.close()
            raise

    @overload
    def generate(
        self,
        prompt: Batch,
        *,
        batch_size: int = ...,
        caller: str = ...,
        timeout: float | None = ...,
        **settings: Unpack[Settings],
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        images: Iterable[ImageSource | Video] = ...,
        videos: Iterable[VideoSource | Video] = ...,
        caller: str = ...,
        timeout: float | None = ...,
        **settings: Unpack[Settings],
    ) -> Generation: ...

    def generate(
        self,
        prompt: Prompt | Batch,
        *,
        images: Iterable[ImageSource | Video] = (),
        videos: Iterable[VideoSource | Video] = (),
        batch_size: int = 8,
        caller: str = "",
        timeout: float | None = None,
        **settings: Unpack[Settings],
    ) -> Generation | list[Generation]:
        """Generates the text that follows a prompt, or each of a list of them.

        prompt: text with an `<image>` for each of `images` and then `videos`, in order; token ids; or a Request that carries its own media
        (there the two may be mixed: Request(prompt=..., media=[path, Video(source=...), array])). Of a list of texts or Requests batch_size
        run at a time; what comes out does not depend on what else runs.
        caller: whose turn it counts against where several share the engine.
        timeout: seconds after which it is given up (DeadlineExceeded).
        settings: beams, max_new_tokens, length_penalty, num_return, temperature, top_k, top_p, seed, as GenerateOptions describes them.
        Raises InputError (PromptError, ImageError, CapacityError) before anything is run.
        """
        options, requests, many = self._asked(prompt, images, videos, batch_size, settings)
        tickets = self._submit(requests, options, batch_size, caller, timeout, wake=False)
        outcomes = self.engine.complete(*tickets)
        found = [self.generation(outcome, options, ticket.timings) for outcome, ticket in zip(outcomes, tickets, strict=True)]
        return found if many else found[0]

    @overload
    async def agenerate(self, prompt: Batch, *, batch_size: int = ..., **settings: Unpack[Settings]) -> list[Generation]: ...

    @overload
    async def agenerate(
        self,
        prompt: Prompt,
        *,
        images: Iterable[ImageSource | Video] = ...,
        videos: Iterable[VideoSource | Video] = ...,
        caller: str = ...,
        timeout: float | None = ...,
        **settings: Unpack[Settings],
    ) -> Generation: ...

    async def agenerate(
        self,
        prompt: Prompt | Batch,
        *,
        images: Iterable[ImageSource | Video] = (),
        videos: Iterable[VideoSource | Video] = (),
        batch_size: int = 8,
        caller: str = "",
        timeout: float | None = None,
        **settings: Unpack[Settings],
    ) -> Generation | list[Generation]:
        """As `generate`, without holding up the event loop. Cancelling the task gives its requests up and frees their rows."""
        options, requests, many = self._asked(prompt, images, videos, batch_size, settings)
        tickets: list[Ticket[Outcome]] = []
        gone = False

        def submit() -> None:
            tickets.extend(self._submit(requests, options, batch_size, caller, timeout, wake=True))
            if gone:  # the task was cancelled meanwhile, which does not stop this thread
                cancel_all(tickets)

        try:
            await asyncio.to_thread(submit)
            found = [self.generation(await ticket, options, ticket.timings) for ticket in tickets]
        except BaseException:
            gone = True
            cancel_all(tickets)
            raise
        return found if many else found[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        images: Iterable[ImageSource | Video] = (),
        videos: Iterable[VideoSource | Video] = (),
        caller: str = "",
        timeout: float | None = None,
        **settings: Unpack[Settings],
    ) -> Stream:
        """As `generate` for one prompt, text given out piece by piece as it becomes certain; `result` is the whole at the end.

        With one branch that is each token. With beams it is what all live beams and finished candidates agree on, the remainder coming
        when the best is known, so that nothing given out is ever taken back. Steps do not wait for the reader. Errors of the request are
        raised here, not at the first piece.
        """
        options = options_from(settings, _OWN_NAMES[:-1])
        if self.tokenizer is None:
            raise InputError(
                "the bundle has no tokenizer, so there is no text to stream. Use generate, which returns token ids."
            )
        (ticket,) = self._submit([as_request(prompt, images, videos)], options, 1, caller, timeout, wake=True, events=True)
        return Stream(
            ticket,
            TextStream(self.tokenizer),
            lambda outcome, timings: self.generation(outcome, options, timings),
            one_text=options.width == 1 or not options.samples,
            stops=options.stops,
        )

    def caption(
        self,
        image: MediumSource | Sequence[MediumSource],
        *,
        shots: Shots = (),
        system: str | None = None,
        caller: str = "",
        timeout: float | None = None,
        **settings: Unpack[Settings],
    ) -> Generation:
        """Describes an image (or Video) in the form that this model was trained with.

        image: one, or a list of them where the bundle has a chat template.
        shots: examples with captions to show first, or the path of a shots file.
        system: instructions before the conversation, where the bundle has a chat template.
        caller, timeout, settings: as `generate` takes them.
        Raises InputError before anything is run.
        """
        request = caption_prompt(as_shots(shots), image, self.inputs, system=system)
        return self.generate(request, caller=caller, timeout=timeout, **settings)

    def ask(
        self,
        image: MediumSource | Sequence[MediumSource] | None,
        question: str,
        *,
        shots: Shots = (),
        system: str | None = None,
        caller: str = "",
        timeout: float | None = None,
        **settings: Unpack[Settings],
    ) -> Generation:
        """Answers a question about an image (or Video) in the form that this model was trained with.

        shots: examples with questions and answers to show first, or the path of a shots file.
        image, system: as `caption` takes them. caller, timeout, settings: as `generate` takes them.
        Raises InputError before anything is run.
        """
        request = qa_prompt(as_shots(shots), question, image, self.inputs, system=system)
        return self.generate(request, caller=caller, timeout=timeout, **settings)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        images: Iterable[ImageSource | Video] = (),
        day: datetime.date = DAY,
        caller: str = "",
        timeout: float | None = None,
        **settings: Unpack[Settings],
    ) -> Generation:
        """Answers the last message of a conversation. `model.stream(chat_prompt(...))` does so piece by piece.

        messages, images, day: as `chat_prompt` takes them. caller, timeout, settings: as `generate` takes them.
        Raises InputError before anything is run.
        """
        request = chat_prompt(messages, listed(images), inputs=self.inputs, day=day)
        return self.generate(request, caller=caller, timeout=timeout, **settings)

    def score(
        self,
        prompt: Prompt,
        candidates: Sequence[str | Sequence[int]],
        *,
        images: Iterable[ImageSource | Video] = (),
        videos: Iterable[VideoSource | Video] = (),
        end: bool = True,
        caller: str = "",
        timeout: float | None = None,
    ) -> list[Score]:
        """Log-likelihood of each candidate after the prompt, in the order given; `max(..., key=lambda s: s.logprob)` is the model's choice.

        candidates: text, joined to a text prompt with a space unless there is one, or token ids, which are scored as they are.
        end: whether `<EOC>` is added to texts that do not end with it, so that the whole answer is scored, as the command line does;
            without it "a" is likelier than "a square" whatever the image shows.
        Raises InputError before anything is run.
        """
        if isinstance(candidates, str | bytes) or not isinstance(candidates, Sequence):
            raise InputError(f"candidates are given as {type(candidates).__name__}; give a list of answers: ['red', 'green']")
        if not candidates:
            raise InputError("no candidates were given. Give a list of at least one answer.")
        request = as_request(prompt, images, videos)
        started = time.perf_counter()
        prepared = self.prepare(request)
        ids = [self.candidate_ids(request, candidate, end) for candidate in candidates]
        timings = Timings(prepare=time.perf_counter() - started)
        (results,) = self.engine.complete(
            self.engine.submit_score(prepared, ids, timings=timings, caller=caller, deadline=deadline_of(timeout), wake=False)
        )
        return [
            Score(
                candidate=candidate if isinstance(candidate, str) else self._decode(candidate),
                logprob=float(np.sum(logprobs)),
                token_logprobs=tuple(logprobs),
            )
            for candidate, logprobs in zip(candidates, results, strict=True)
        ]

    def prepare(self, request: Request, known: dict[bytes, Medium] | None = None) -> Prepared:
        """The checked form of a request that `engine.submit` takes: token ids, phi, decoded media.

        known: media of other requests by digest, which are held in memory once; this request's are added.
        Raises InputError (PromptError, ImageError).
        """
        return prepare(
            request, self.config, self.tokenizer, known, recent=self._recent, fit=self.inputs.fit, forms=self.inputs.prompts
        )

    def close(self) -> None:
        """Frees graphs, weights, media and cache. What is under way fails (EngineClosed)."""
        self.engine.close()
        self.engines.close()

    def __repr__(self) -> str:
        limits, precision = self.manifest.limits, self.manifest.precision.name
        return f"Model({str(self.bundle)!r}: Flamingo {self.config.name}, {precision}, on {self.backend.name}, {limits.max_length} cache slots)"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _asked(
        self,
        prompt: Prompt | Batch,
        images: Iterable[ImageSource | Video],
        videos: Iterable[VideoSource | Video],
        batch_size: int,
        settings: Settings,
    ) -> tuple[GenerateOptions, list[Request], bool]:
        """Options, requests, and whether a list of them was given."""
        options = options_from(settings, _OWN_NAMES)
        if not (isinstance(prompt, list) and any(isinstance(item, str | Request) for item in prompt)):
            return options, [as_request(prompt, images, videos)], False
        requests = [as_request(item) for item in prompt]
        if len(listed(images)) + len(listed(videos)):
            raise InputError("with a list of prompts, give each its media: Request(prompt=..., media=[...])")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1")
        return options, requests, True

    def _submit(
        self,
        requests: Sequence[Request],
        options: GenerateOptions,
        batch_size: int,
        caller: str,
        timeout: float | None,
        *,
        wake: bool,
        events: bool = False,
    ) -> list[Ticket[Outcome]]:
        """Hands requests to the engine once all of them are known to be possible."""
        started = time.perf_counter()
        options.check(self.config)
        known: dict[bytes, Medium] = {}
        for request in requests:
            options.check_seed(request.seed)
        prepared = [self.prepare(request, known) for request in requests]
        for ready in prepared:
            self.engine.new_tokens(ready, options)
        seconds = (time.perf_counter() - started) / len(prepared)
        queue = list(zip(requests, prepared, strict=True))
        return submit_all(
            self.engine, queue, options, batch_size, caller=caller, timeout=timeout, wake=wake, events=events, seconds=seconds
        )

    def generation(self, outcome: Outcome, options: GenerateOptions, timings: Timings) -> Generation:
        """What a finished search found."""
        best, *others = (self._text(hypothesis, options.stops) for hypothesis in outcome.hypotheses[: options.num_return])
        return Generation(
            text=best.text,
            token_ids=best.token_ids,
            token_logprobs=best.token_logprobs,
            score=best.score,
            finished=best.finished,
            top_logprobs=best.top_logprobs,
            alternatives=tuple(others),
            timings=timings,
        )

    def _text(self, hypothesis: Hypothesis, stops: Sequence[str]) -> Text:
        return Text(
            text=cut_at(self._decode(hypothesis.token_ids), stops).strip(),
            token_ids=hypothesis.token_ids,
            token_logprobs=hypothesis.token_logprobs,
            score=hypothesis.score,
            finished=hypothesis.reason == "stop",
            top_logprobs=hypothesis.top,
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids)

    def candidate_ids(self, request: Request, candidate: str | Sequence[int], end: bool) -> list[int]:
        """Token ids of a candidate answer after the request's prompt; end: with `<EOC>`. Raises InputError."""
        return candidate_ids(request, candidate, end, config=self.config, inputs=self.inputs, tokenizer=self.tokenizer)
