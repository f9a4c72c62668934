"""Candidates instead of the vocabulary: the same search, and the same numbers whether the decoder finds them or the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.backends.tensorrt.lowering.candidates import add_candidates, with_candidates
from flamingo_export.errors import BundleError
from flamingo_export.runtime.beam_search import BeamSearch
from flamingo_export.runtime.candidates import Candidates, candidates_of
from flamingo_export.runtime.sampling import Sampling
from flamingo_export.runtime.search import StopRule
from flamingo_export.specs import LOG_SUM_EXP, TOP_IDS, TOP_VALUES, SubgraphSpec, TensorSpec

EOC, IMAGE = 2, 3


def whole_vocabulary_beam_search(rows, beams: int, steps: int, penalty: float):
    """Beam search over every token of every beam, written anew: no cut of candidates anywhere but the best 2W of all.

    rows(tokens): float32 logits [V] after a beam's tokens. Returns [(tokens, score)], best first.
    """
    live: list[tuple[list[int], float]] = [([], 0.0)]
    kept: list[tuple[list[int], float]] = []
    for step in range(1, steps + 1):
        options = []
        for place, (tokens, score) in enumerate(live):
            logits = rows(tokens).astype(np.float32)
            logits[IMAGE] = -np.inf
            top = logits.max()
            total = np.float64(np.log(np.exp(logits - top).sum())) + top
            options += [(-(score + (np.float64(value) - total)), place, token) for token, value in enumerate(logits)]
        options.sort()
        best = options[: 2 * beams]
        for cost, place, token in best[:beams]:
            if token == EOC or step == steps:
                kept.append(([*live[place][0], token], -cost / step**penalty))
        kept = sorted(kept, key=lambda one: -one[1])[:beams]
        live = [([*live[place][0], token], -cost) for cost, place, token in best if token != EOC and step < steps][:beams]
        if not live or (len(kept) == beams and live[0][1] / step**penalty <= kept[-1][1]):
            break
    return kept


def model_of(seed: int, size: int, levels: int):
    """Logits that depend on the tokens so far. Few levels make ties, within a beam and between beams; `<EOC>` is likely now and then."""

    def logits(tokens: list[int]) -> np.ndarray:
        rng = np.random.default_rng([seed, *tokens])
        drawn = rng.integers(0, levels, size).astype(np.float32) if levels else rng.normal(0, 2, size).astype(np.float32)
        drawn[EOC] += np.float32(rng.choice([-3, 0, 2]))
        drawn[IMAGE] = 50  # the best by far, and never generated
        return drawn

    return logits


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(12, 200), beams=st.integers(2, 6), steps=st.integers(1, 6),
    penalty=st.sampled_from([0.0, 1.0, -0.5]), levels=st.sampled_from([0, 0, 3]), given_by_decoder=st.booleans(),
)  # fmt: skip
def test_w_plus_one_candidates_are_enough(seed, size, beams, steps, penalty, levels, given_by_decoder):
    model = model_of(seed, size, levels)
    search = BeamSearch(StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=steps), beams=beams, length_penalty=penalty)
    branches: list[list[int]] = [[]]
    while True:
        logits = np.stack([model(tokens) for tokens in branches])
        scores = candidates_of(logits, IMAGE, beams + 1) if given_by_decoder else logits
        step = search.advance(scores)
        if step is None:
            break
        branches = [[*branches[parent], int(token)] for parent, token in zip(step.parents, step.tokens, strict=True)]
    expected = whole_vocabulary_beam_search(model, beams, steps, penalty)
    found = search.results()
    assert [list(one.token_ids) for one in found] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([one.score for one in found], [score for _, score in expected], atol=1e-5)
    assert all(IMAGE not in one.token_ids for one in found)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(5, 300), top_k=st.sampled_from([None, 1, 3, 70]),
    top_p=st.sampled_from([None, 0.5, 0.9]), temperature=st.sampled_from([0.0, 0.7, 1.5]),
)  # fmt: skip
def test_sampling_from_candidates_is_sampling_from_logits(seed, size, top_k, top_p, temperature):
    """The same draws, from candidates more than are needed too."""

    def texts(found_by_decoder: bool):
        rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=4)
        search = Sampling(rule, branches=2, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        model = model_of(seed, size, 0)
        branches: list[list[int]] = [[]]
        step: Any = search
        while step is not None:
            scores: Any = np.stack([model(tokens) for tokens in branches])
            if found_by_decoder and search.num_candidates is not None:
                scores = candidates_of(scores, IMAGE, search.num_candidates + 2)
            step = search.advance(scores)
            if step is not None:
                branches = [[*branches[p], int(t)] for p, t in zip(step.parents, step.tokens, strict=True)]
        return [(one.token_ids, one.token_logprobs) for one in search.results()]

    assert texts(True) == texts(False)


def test_numbers_that_are_not_finite_are_refused():
    good = Candidates(ids=np.array([[4]]), values=np.array([[1.0]], np.float32), log_sum_exp=np.array([2.0]))
    assert candidates_of(good, IMAGE, 1) is good
    for values, total in (([[np.nan]], [2.0]), ([[1.0]], [np.nan]), ([[np.inf]], [np.inf])):
        bad = Candidates(ids=np.array([[4]]), values=np.array(values, np.float32), log_sum_exp=np.array(total))
        with pytest.raises(BundleError, match="not finite"):
            candidates_of(bad, IMAGE, 1)


@pytest.mark.parametrize("banned", [(IMAGE,), (IMAGE, 50, 89)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_graph_finds_what_the_host_finds(tmp_path: Path, dtype, banned):
    """The lowered graph's candidates, run by ONNX Runtime, against the host's and fp64: large logits, ties, banned tokens the largest."""
    size, count = 90, 5
    kind = ir.DataType.FLOAT if dtype is np.float32 else ir.DataType.FLOAT16
    spec = SubgraphSpec(
        name="decoder",
        inputs=(TensorSpec("x", "float", ("B", "K", size)),),
        outputs=(TensorSpec("logits", "float", ("B", "K", size)),),
    )
    x, y = (ir.Value(name=name, shape=ir.Shape(["B", "K", size]), type=ir.TensorType(kind)) for name in ("x", "logits"))
    model = ir.Model(
        ir.Graph([x], [y], name="x", nodes=[ir.node("Identity", [x], outputs=[y])], opset_imports={"": 24}), ir_version=10
    )
    contract = with_candidates(spec, count)
    assert [tensor.name for tensor in contract.outputs] == ["logits", TOP_VALUES, TOP_IDS, LOG_SUM_EXP]
    add_candidates(model, contract, banned=banned)
    path = tmp_path / "x.onnx"
    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    rng = np.random.default_rng(0)
    logits = (rng.normal(0, 30, (2, 3, size)) + 100).astype(dtype)  # exp of any of them would overflow
    logits[..., list(banned)] = 400
    logits[0, 0, [8, 6, 11]] = 300
    values, ids, total = session.run([TOP_VALUES, TOP_IDS, LOG_SUM_EXP], {"x": logits})
    host = candidates_of(logits.reshape(-1, size).astype(np.float32), banned, count)
    assert np.array_equal(ids.reshape(-1, count), host.ids)
    assert ids[0, 0, :3].tolist() == [6, 8, 11]
    assert np.array_equal(values.reshape(-1, count), host.values)
    exact = np.delete(logits.astype(np.float64), list(banned), axis=-1)
    np.testing.assert_allclose(total, np.log(np.exp(exact - 300).sum(-1)) + 300, rtol=1e-6)
    np.testing.assert_allclose(host.log_sum_exp, total.reshape(-1), rtol=1e-6)


def test_a_part_without_logits_has_no_candidates():
    spec = SubgraphSpec(name="decoder.0", inputs=(), outputs=(TensorSpec("hidden_out", "float", ("B", "S", 4)),))
    assert with_candidates(spec, 3) is spec
