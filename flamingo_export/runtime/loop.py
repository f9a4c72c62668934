"""The generation core: media, prompts and decoding steps of all requests, one action at a time. One loop for all backends.

`tick` does what the scheduler says: admits a request, encodes some of its media (`encode`), computes a chunk of its prompt (`prefill`), or
decodes all rows once (`step`); after a prompt and after a step each request's search chooses its tokens (`choose`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flamingo_export.backends.base import RunsAhead
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import BackendLost, DeadlineExceeded
from flamingo_export.runtime.ahead import Flight, could_follow, handed, run_with
from flamingo_export.runtime.cache import Cache
from flamingo_export.runtime.calls import Call, decode_feeds, plan_calls
from flamingo_export.runtime.candidates import CANDIDATES, Candidates, Scores, from_outputs, inputs_of, run_decoder
from flamingo_export.runtime.jobs import Generating, Job, Scoring
from flamingo_export.runtime.media_bank import MediaBank
from flamingo_export.runtime.media_encoder import Encoding, MediaEncoder
from flamingo_export.runtime.prefill import check_phi, chunk_feeds, looking_at
from flamingo_export.runtime.scheduler import Kind, Schedule, next_action, overdue
from flamingo_export.runtime.search import Foreseen, Hypothesis
from flamingo_export.runtime.subgraphs import Engines
from flamingo_export.runtime.ticket import Ticket
from flamingo_reference.arrays import Ints
from flamingo_reference.config import ModelConfig

NONE: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a generating request ends with: its texts, best first."""

    hypotheses: list[Hypothesis]


class Loop:
    """Owns the cache's rows and the media bank, which outlive a request: the next one about the same images finds them there.

    Not for several threads at once, but for `inbox` and `revoked`, which any thread may append to.
    """

    def __init__(self, engines: Engines, config: ModelConfig, limits: ShapeLimits, rows: int, now: Callable[[], float]) -> None:
        self.config, self.limits = config, limits
        self.decoder = engines.decoder
        self.encoder = MediaEncoder(engines.vision_encoder, engines.resampler, engines.media_kv, config)
        self.bank = MediaBank(engines.decoder, limits.bank_rows)
        self.cache = Cache(engines.decoder, limits, rows)
        self.schedule: Schedule[Job] = Schedule(rows=rows, bank_rows=limits.bank_rows)
        self.inbox: deque[Job] = deque()
        self.revoked: deque[Ticket[Any]] = deque()
        self.counts: Counter[str] = Counter()
        """What has happened since the start, by the names of `EngineStats`."""
        self.lost: BackendLost | None = None
        """Why nothing can be computed any more."""
        self.failed_in_a_row = 0
        """Actions that failed since a step succeeded."""
        self._now = now
        self._jobs: dict[Ticket[Any], Job] = {}
        self._calls: list[Call] = []
        self._planned: list[Job] = []
        self._flight: Flight | None = None
        """A step that is computed while what the one before gave is looked at."""

    @property
    def size(self) -> int:
        """Requests that wait or run."""
        return len(self._jobs) + len(self.inbox)

    def tick(self) -> bool:
        """One action. False if there was nothing to do."""
        self._take_in()
        if self.lost is not None:
            self._fail((), self.lost)
            return False
        kind, entry = next_action(self.schedule, self._now())
        if kind is Kind.DECODE:
            self._decode()
        elif self._flight is not None:  # what it finds may change what is to be done
            flight, self._flight = self._flight, None
            self._land(flight, None)
        elif kind is Kind.IDLE:
            return False
        elif kind is Kind.EXPIRE:
            for late in overdue(self.schedule.entries(), self._now()):
                self._leave(late, DeadlineExceeded("the request was not finished by its deadline"))
            self.schedule.expired()
        else:
            assert entry is not None
            try:
                self._admit(entry) if kind is Kind.ADMIT else self._work(entry)
            except Exception as error:
                self._fail([entry], error)
        return True

    def drop(self, error: Callable[[], BaseException]) -> None:
        """Everything that waits or runs fails."""
        self._take_in()
        for job in list(self._jobs.values()):
            self._leave(job, error())
        self._flight = None

    def abandon(self, error: BaseException | None) -> None:
        """After an interruption at any point: what was taken in is failed or cancelled (None), and nothing is in use any more."""
        for ticket in self._jobs:
            ticket.give_up() if error is None else ticket.fail(error)
        self._jobs.clear()
        self._planned, self._flight = [], None
        self.schedule = Schedule(rows=len(self.cache.rows), bank_rows=self.bank.capacity)
        self.bank.unpin_all()
        self.cache.clear()

    # Requests come and go.

    def _take_in(self) -> None:
        while self.inbox:
            job = self.inbox[0]
            self._jobs[job.ticket] = job
            self.inbox.popleft()  # not before it is known, so that an interrupt loses nobody's request
            if job.ticket.done:  # given up by such an interrupt
                del self._jobs[job.ticket]
            elif job.group is not None and job.group.active >= job.group.limit:
                job.group.backlog.append(job)
            else:
                self._arrive(job)
        while self.revoked:
            ticket = self.revoked.popleft()
            if ticket in self._jobs:
                self._leave(self._jobs[ticket], None)

    def _arrive(self, job: Job) -> None:
        if job.group is not None:
            job.group.active += 1
        if self.schedule.running >= self.schedule.rows:  # it waits for its turn: what is in the cache is not computed again
            job.cost = max(1, job.cost - self.cache.known(job.request.keys))
        self.schedule.arrive(job)

    def _admit(self, job: Job) -> None:
        """The request gets a row of the cache, and its media rows of the bank."""
        job.timings.queued += job.elapsed()
        self.schedule.admit(job)
        media = job.request.media
        missing = self.bank.pin(media)
        job.admitted = True
        job.seat = self.cache.take(job.request.keys, slots=job.slots, columns=job.columns)
        job.timings.media_encoded += len(missing)
        job.timings.media_reused += len(job.media) - len(missing)
        job.timings.prompt_tokens += len(job.request.token_ids)
        self.counts.update(media_encoded=len(missing), media_reused=len(job.media) - len(missing))
        check_phi(job.request.phi, job.request.num_media)

    def _settle(self, job: Job) -> None:
        """A prompt's turn has come: those before it may have computed its beginning by now, and it may share a row with them."""
        assert job.seat is not None
        looks = job.looked_at.tolist() if isinstance(job, Generating) else ()
        job.settle(self.cache.settle(job.seat, job.request.keys, slots=job.slots, looks=looks, steps=job.steps))
        job.timings.reused_tokens += job.done
        self.counts.update(reused_tokens=job.done, shared_rows=len(job.row.seats) > 1)

    def _leave(self, job: Job, error: BaseException | None, *, finished: bool = False) -> None:
        """A request ends: with an error, cancelled (None), or finished. What it used is free."""
        if self._jobs.pop(job.ticket, None) is None:
            return
        self.counts["finished" if finished else "cancelled" if error is None else "failed"] += 1
        if job.admitted:
            self.bank.unpin(job.request.media)
        if job.seat is not None:
            self.cache.release(job.seat)
        self.schedule.leave(job)
        group = job.group
        if group is not None:
            if job in group.backlog:
                group.backlog.remove(job)
            else:
                group.active -= 1
                if group.backlog:
                    self._arrive(group.backlog.pop(0))
        if not finished:
            job.ticket.give_up() if error is None else job.ticket.fail(error)

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        """Requests fail; all that have rows do, if the cache was lost while it was to grow, and all there are, if the device was."""
        if isinstance(error, BackendLost):
            self.lost = error
            jobs = list(self._jobs.values())
        if self.cache.lost:
            self.cache.lost = False
            jobs = [*jobs, *(job for job in self._jobs.values() if job.seat is not None)]
        self.failed_in_a_row += 1
        for job in jobs:
            self._leave(job, error)

    # Work on one request.

    def _work(self, job: Job) -> None:
        if job.media_rows is None:
            self.encode(job)
            self.schedule.work_done(job, decodes=False)
            return
        if job.done < len(job.request.token_ids):
            scores = self.prefill(job)
            if scores is None:
                self.schedule.work_done(job, decodes=False)
                return
            if isinstance(job, Generating):
                job.start()
                self.schedule.work_done(job, decodes=True)
                self.choose(job, scores)
                return
            assert isinstance(job, Scoring)
            job.start(scores)
        else:
            assert isinstance(job, Scoring)
            self.score(job)
        self.schedule.work_done(job, decodes=False)
        if job.finished:
            self._leave(job, None, finished=True)
            job.ticket.finish(job.results)

    def encode(self, job: Job) -> None:
        """One call of the vision encoder for the request, short where others wait for their next tokens."""
        if job.encoding is None:
            job.encoding = Encoding(self.encoder, self.bank.missing({m.digest: m for m in job.request.media}.values()))
        if job.encoding.remaining:
            alone = self.encoder.asynchronous or not self.schedule.decoding
            for medium, values in job.encoding.step(self.encoder.frames if alone else 1):
                self.bank.store(medium, values)
        if not job.encoding.remaining:
            job.media_rows = self.bank.rows_of(job.request.media)
            job.timings.media += job.elapsed()

    def prefill(self, job: Job) -> Scores | None:
        """The next chunk of a prompt; after the last one the candidates [1, n] or logits [1, V] of what follows, else None."""
        if job.seen is None:
            self._settle(job)
        assert job.seen is not None
        request, row, start = job.request, job.row, job.done
        assert job.media_rows is not None
        stop = min(start + self.limits.chunk, len(request.token_ids))
        first = None if request.first is None else request.first[start:stop]
        count = looking_at(request.phi[start:stop], first, job.media_rows, self.decoder.largest.get("M"))
        stop, ends = start + count, start + count == len(request.token_ids)
        self.cache.reserve(row.index + 1, row.used + count)
        self.cache.bind(row.index, 1)
        job.place(count)
        feeds = chunk_feeds(
            request.token_ids[start:stop],
            request.phi[start:stop],
            job.media_rows,
            position=start,
            slot=row.used,
            visible=job.seen[: self.cache.capacity],
            key_positions=row.key_positions[: self.cache.capacity],
            # Logits cost a product with the whole vocabulary, so none are asked for until a prompt ends.
            logits=np.array([count - 1], np.int64) if ends else NONE,
            first=None if request.first is None else request.first[start:stop],
        )
        scores = run_decoder(self.decoder, self.bank.narrowed(feeds), job.num_candidates)
        self.counts["prompt_tokens"] += count
        job.commit_prompt(count)
        return scores[0] if ends else None

    def score(self, job: Scoring) -> None:
        """The next pass over a request's candidate answers."""
        self.cache.reserve(job.row.index + 1, job.row.used + job.pass_slots)
        self.cache.bind(job.row.index, 1)
        job.take(run_decoder(self.decoder, self.bank.narrowed(job.feeds(self.cache.capacity)), None)[0])

    # Steps of all that decode.

    def _decode(self) -> None:
        flight, self._flight = self._flight, None
        if flight is None:
            calls = self._plan()
            if len(calls) != 1 or self.schedule.working or could_follow(self.decoder, calls[0].jobs) is None:
                self._decode_each(calls)
                self.schedule.decoded()
                return
            flight = self._ask(calls[0], None, {})
        if flight is not None:
            following = self._follow(flight)
            self._land(flight, following)
            if following is not None and any(map(self._runs, following.call.jobs)):
                self._flight = following
        self.schedule.decoded()

    def _decode_each(self, calls: Sequence[Call]) -> None:
        """One call after the other, each waited for."""
        for call in calls:
            try:
                self._prefetch()
                scores = self.step(call)
            except Exception as error:
                self._fail(call.jobs, error)
                continue
            for job in call.jobs:
                try:
                    self.choose(job, call.of(job, scores))
                except Exception as error:
                    self._leave(job, error)

    def step(self, call: Call) -> Scores:
        """One step of the rows of a call: candidates [B, W, n] or logits [B, W, V]."""
        rows = self.cache.rows
        self.cache.reserve(call.first + call.count, call.slots_needed(rows))
        self.cache.bind(call.first, call.count)
        feeds = decode_feeds(call, rows, self.cache.capacity, self.config.tokens.pad)
        wanted = [job.num_candidates for job in call.jobs]
        known = [count for count in wanted if count is not None]
        scores = run_decoder(self.decoder, self.bank.narrowed(feeds), max(known) if len(known) == len(wanted) else None)
        for job in call.jobs:
            job.commit()
        self.counts["steps"] += 1
        self.failed_in_a_row = 0
        return scores

    def choose(self, job: Generating, scores: Scores, following: Flight | None = None) -> None:
        """The request's search chooses its next tokens, or ends it. following: a step that runs it with tokens that were foreseen."""
        ran = run_with(following, job, scores) if following is not None and isinstance(scores, Candidates) else None
        step = job.search.advance(scores)
        timings, elapsed = job.timings, job.elapsed()
        if job.chosen:
            timings.steps.append(elapsed)
        else:
            timings.prefill += elapsed
        job.chosen += 1
        self.counts["generated_tokens"] += 1
        if job.events and (news := job.news()):
            job.ticket.push(*news)
        if step is None:
            self._leave(job, None, finished=True)
            job.ticket.finish(Outcome(hypotheses=job.search.results()))
        elif following is None:
            job.follow(step)
        elif ran is not None and np.array_equal(ran, step.tokens):
            job.confirm(step)
        else:
            following.astray.add(job)
            self.counts["run_again"] += 1
            job.go_back(step, following.slots[job])

    # Steps that are asked for before the one before is known (`ahead.py`).

    def _ask(self, call: Call, before: Flight | None, foreseen: Mapping[Generating, Foreseen]) -> Flight | None:
        """Asks for a step of a call without waiting for it. before: the step whose candidates its tokens are taken from, where any are
        foreseen. None: it failed, and so have its jobs."""
        try:
            self._prefetch()
            sources = {} if before is None else {job: before.branches(job) for job in foreseen}
            for job, each in foreseen.items():
                job.foresee(each.tokens)
            rows = self.cache.rows
            self.cache.reserve(call.first + call.count, call.slots_needed(rows))
            self.cache.bind(call.first, call.count)
            feeds = decode_feeds(call, rows, self.cache.capacity, self.config.tokens.pad)
            hand = None if before is None else handed(before, call, foreseen, sources)
            assert isinstance(self.decoder, RunsAhead)
            running = self.decoder.start(inputs_of(self.decoder, self.bank.narrowed(feeds)), CANDIDATES, hand)
        except Exception as error:
            self._fail([job for job in call.jobs if self._runs(job)], error)
            return None
        flight = Flight(
            call=call,
            running=running,
            columns={job: job.column for job in call.jobs},
            slots={job: job.row.used + job.column for job in call.jobs},
            foreseen=foreseen,
        )
        for job in call.jobs:
            job.commit()
        return flight

    def _follow(self, flight: Flight) -> Flight | None:
        """The step after one that is not read yet, where it can be asked for already."""
        if self.schedule.working:  # whose turn comes next, and which waits for all that was asked before
            return None
        calls = self._plan()
        if len(calls) != 1 or any(job not in flight.columns or job in flight.astray for job in calls[0].jobs):
            return None
        call, cache = calls[0], self.cache
        if call.first + call.count > cache.batch or call.slots_needed(cache.rows) > cache.capacity:
            return None
        foreseen = could_follow(self.decoder, call.jobs)
        if foreseen is None:
            return None
        self.counts["asked_ahead"] += 1
        return self._ask(call, flight, foreseen)

    def _land(self, flight: Flight, following: Flight | None) -> None:
        """Waits for a step, and each search that still runs chooses. following: the step that was asked for after it."""
        jobs = [job for job in flight.call.jobs if self._runs(job)]
        if not jobs:
            return
        try:
            scores = from_outputs(flight.running.result())
        except Exception as error:
            self._fail(jobs, error)
            return
        self.counts["steps"] += 1
        self.failed_in_a_row = 0
        for job in jobs:
            if job in flight.astray:
                continue
            own = flight.of(job, scores)
            try:
                self.choose(job, own, following if following is not None and job in following.columns else None)
            except Exception as error:
                self._leave(job, error)

    def _runs(self, job: Job) -> bool:
        return self._jobs.get(job.ticket) is job

    def _plan(self) -> list[Call]:
        jobs = self.schedule.decoding
        most = self.limits.max_length
        if self._planned != jobs or any(call.count > 1 and call.slots_needed(self.cache.rows) > most for call in self._calls):
            self._planned = list(jobs)
            generating = [job for job in jobs if isinstance(job, Generating)]
            self._calls = plan_calls(generating, self.cache.rows, most, buckets="B" in self.decoder.largest)
        return self._calls

    def _prefetch(self) -> None:
        """Where encoding overlaps with steps: media of a request that waits are encoded early, a call at a time, as far as rows are free."""
        if not self.encoder.asynchronous or self.schedule.working:
            return
        job = self._next_waiting()
        if job is None:
            return
        media = list({medium.digest: medium for medium in job.request.media}.values())
        missing = self.bank.fitting_beside(media)
        if missing:
            for medium, values in Encoding(self.encoder, missing).step(self.encoder.frames):
                self.bank.store(medium, values)

    def _next_waiting(self) -> Job | None:
        if self.schedule.ring:
            return self.schedule.queues[self.schedule.ring[0]][0]
        groups = (job.group for job in self.schedule.decoding if job.group is not None)
        return next((group.backlog[0] for group in groups if group.backlog), None)
