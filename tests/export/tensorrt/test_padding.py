"""Batches padded to buckets: what padding writes lies behind all that is in use, and the media bank is never written."""

from __future__ import annotations

import numpy as np
from engine_steps import request
from fake_gpu import LIMITS, add_engines

import flamingo_export
from flamingo_export.runtime.calls import Call
from flamingo_export.runtime.loop import Loop
from flamingo_export.runtime.options import GenerateOptions


def test_padding_writes_behind_what_is_in_use_and_never_into_the_bank(gpu, tiny_bundle, tmp_path, monkeypatch):
    """Every step of rows that come and go: slots in use of all rows, padded, waiting and decoding, are the same bytes before and after."""
    bundle = add_engines(tiny_bundle, tmp_path / "x.bundle", **{**LIMITS, "batch": 4})
    seen = {"padded rows": 0, "rows in use beside": 0, "steps": 0}
    step = Loop.step

    def watched(self: Loop, call: Call):
        rows = self.cache.rows[: self.cache.batch]
        held = [row.used if row.busy else len(row.held) for row in rows]
        if call.first + call.count > self.cache.batch:
            return step(self, call)
        # What a free row keeps of an earlier prompt may be given up for padding, where it leaves no room behind.
        before = {name: buffer.read() for name, buffer in self.cache._buffers.items()}
        bank = {name: buffer.read() for name, buffer in self.bank._buffers.items()}
        found = step(self, call)
        for name, buffer in self.cache._buffers.items():
            after = buffer.read()
            for index, (row, count) in enumerate(zip(rows, held, strict=True)):
                kept = count if row.busy else min(count, len(row.held))
                assert np.array_equal(after[index, :, :kept], before[name][index, :, :kept]), (name, index)
        for name, buffer in self.bank._buffers.items():
            assert np.array_equal(buffer.read(), bank[name], equal_nan=True), name
        decoding = {job.row.index for job in call.jobs}
        padded = set(range(call.first, call.first + call.count)) - decoding
        seen["steps"] += 1
        seen["padded rows"] += len(padded)
        seen["rows in use beside"] += sum(rows[index].busy for index in padded)
        return found

    monkeypatch.setattr(Loop, "step", watched)
    with flamingo_export.load(bundle, backend="tensorrt-rtx", rows=4) as model:
        engine, loop = model.engine, model.engine.loop
        tickets = []
        for seed, (length, tokens) in enumerate([(9, 12), (30, 3), (21, 9), (40, 7), (12, 5), (33, 4)]):
            options = GenerateOptions(beams=2, max_new_tokens=tokens)
            tickets.append(engine.submit(model.prepare(request(400 + seed, length, seed % 3)), options, wake=False))
        while loop.tick():
            pass
        together = [ticket.result().hypotheses[0].token_ids for ticket in tickets]
        for seed, (length, tokens) in enumerate([(9, 12), (30, 3), (21, 9), (40, 7), (12, 5), (33, 4)]):
            alone = model.generate(request(400 + seed, length, seed % 3), beams=2, max_new_tokens=tokens)
            assert alone.token_ids == together[seed]
    assert seen["steps"] > 10
    assert seen["padded rows"] > 3
    assert seen["rows in use beside"] > 0
