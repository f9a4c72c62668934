"""Every kind of model: names, weights, graphs, the cached decoder, and a build compared with the reference case by case."""

from __future__ import annotations

from pathlib import Path

import graph_contract
import msgspec
import numpy as np
import pytest
import torch
from engine_runs import opened
from variations import IDEFICS, VARIATIONS, drawn_model

import flamingo_export
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import CapacityError
from flamingo_export.precision import StorageType
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Prepared
from flamingo_export.specs import SUBGRAPHS, subgraph_specs
from flamingo_export.validate.expected.cases import phi_cases
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo
from flamingo_reference.model.subgraphs import SUBGRAPHS as REFERENCE_SUBGRAPHS
from flamingo_reference.model.subgraphs import decoder_of
from flamingo_reference.phi import phi_from_tokens
from flamingo_reference.search import NextLogits, Rules, beam_search, flamingo_next_logits, greedy, score_candidates

each = pytest.mark.parametrize("config", VARIATIONS.values(), ids=VARIATIONS)


@each
def test_names_and_json(config: ModelConfig) -> None:
    graph_contract.names_and_json(config)


@each
def test_every_tensor_goes_into_one_weight_of_its_shape(config: ModelConfig) -> None:
    graph_contract.weights_from_tensors(config, shared=("vision_encoder.", "gate"))


@each
def test_graphs_keep_the_contract(config: ModelConfig, tmp_path: Path) -> None:
    graph_contract.graphs_keep_the_contract(config, tmp_path / "v.bundle")
    assert tuple(REFERENCE_SUBGRAPHS) == SUBGRAPHS == tuple(subgraph_specs(config))


@each
def test_the_cached_decoder_is_the_whole_model(config: ModelConfig) -> None:
    """In parts, in chunks, against a cache with slots that are not in order of positions."""
    model = drawn_model(config, dtype=torch.float64)
    lm, block = config.language_model, config.cross_attention
    rng = np.random.default_rng(0)
    bank = [
        tuple(torch.from_numpy(rng.standard_normal((2, block.kv_heads, config.resampler.num_latents, block.head_size))) for _ in "kv")
        for _ in config.gated_layers
    ]  # fmt: skip
    tokens = torch.from_numpy(rng.integers(5, lm.vocab_size - 2, (1, 9)))
    phi = torch.tensor([[0, 1, 1, 1, 2, 2, 0, 0, 2]])
    first = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0, 2]]) if config.sees_groups else None
    rows = torch.tensor([[1, 0]])
    wanted = model(tokens, bank, rows, phi, first)
    parts = [decoder_of(model, range(1)), decoder_of(model, range(1, lm.num_layers))]
    capacity, start = 16, 3  # slots 0 .. 2 hold nothing that may be seen
    caches = {
        f"past_{kind}.{j}": torch.randn(1, lm.kv_heads, capacity, lm.head_size, dtype=torch.float64)
        for j in range(lm.num_layers)
        for kind in "kv"
    }
    slots = torch.arange(capacity)
    found = []
    for begin, stop in ((0, 4), (4, 5), (5, 9)):
        places = torch.arange(begin, stop)
        feeds = {
            "token_ids": tokens[:, begin:stop],
            "positions": places[None],
            "media_rows": rows,
            "phi": phi[:, begin:stop],
            "first_media": phi[:, begin:stop] if first is None else first[:, begin:stop],
            "write_index": torch.tensor([start + begin]),
            "mask": ((slots >= start) & (slots <= start + places[:, None]))[None, None],
            "key_positions": (slots - start)[None],
            "logit_positions": torch.arange(stop - begin)[None],
        }
        feeds |= {f"media_{kind}.{i}": value for i, pair in enumerate(bank) for kind, value in zip("kv", pair, strict=True)}
        for part in parts:
            given = feeds | caches
            results = part({name: given[name] for name in part.inputs})
            caches |= {name.replace("present", "past"): value for name, value in results.items() if name.startswith("present")}
            feeds["hidden"] = results.get("hidden_out", torch.empty(0))
        found.append(results["logits"])
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["fp32", "fp16"])
@each
def test_built_engines_are_the_reference(config: ModelConfig, storage: StorageType, tmp_path: Path) -> None:
    report = graph_contract.build_passes_parity(config, tmp_path / "v.bundle", storage)
    assert set(phi_cases(config)) <= {row.case for row in report.rows}
    assert {trace.num_beams for trace in report.traces} == {1, 3}


IMAGE = IDEFICS.tokens.image
PROMPT = [1, IMAGE, 9, 12]


def picture() -> torch.Tensor:
    return torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(2))


def next_logits(model: Flamingo) -> NextLogits:
    return flamingo_next_logits(model, model.media_kv(model.latents(picture().double()[:, None])), [0])


@pytest.fixture(scope="module")
def resetting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flamingo, Path]:
    """A model whose reset is a token that it says of its own accord, two tokens after PROMPT, and then goes on."""
    free = msgspec.structs.replace(IDEFICS, tokens=msgspec.structs.replace(IDEFICS.tokens, reset=None))
    said = greedy(next_logits(drawn_model(free, dtype=torch.float64)), PROMPT, Rules(eoc=2, image=IMAGE, max_new_tokens=6))
    reset = said.hypotheses[0].token_ids[1]
    assert reset not in (0, 1, 2, *said.hypotheses[0].token_ids[:1])
    model = drawn_model(msgspec.structs.replace(IDEFICS, tokens=msgspec.structs.replace(IDEFICS.tokens, reset=reset)))
    bundle: Path = tmp_path_factory.mktemp("reset") / "reset.bundle"
    flamingo_export.build(model, out=bundle, parity="skip")
    return model.double(), bundle


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("ends", [False, True], ids=["the reset is generated", "the prompt ends with it"])
def test_what_follows_a_reset_sees_no_medium(resetting: tuple[Flamingo, Path], ends: bool, beams: int) -> None:
    model, bundle = resetting
    reset = model.config.tokens.reset
    assert reset is not None
    prompt = [*PROMPT, reset] if ends else PROMPT
    wanted = beam_search(next_logits(model), prompt, Rules(eoc=2, image=IMAGE, max_new_tokens=8), beams=beams)
    assert wanted.closest > 1e-4
    assert ends or any(reset in text.token_ids[:-1] for text in wanted.hypotheses)
    with opened(bundle) as runs:
        found = runs.generate(prompt, picture(), beams=beams, new_tokens=8)
    assert [text.token_ids for text in found] == [text.token_ids for text in wanted.hypotheses]
    for mine, theirs in zip(found, wanted.hypotheses, strict=True):
        assert mine.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)


def test_candidates_with_a_reset_are_scored_as_the_reference_scores_them(resetting: tuple[Flamingo, Path]) -> None:
    model, bundle = resetting
    reset = model.config.tokens.reset
    assert reset is not None
    candidates = [[7, reset, 8, 9, 10], [7, 8, 9], [reset, 11], [20, reset, 21]]
    wanted = [text.token_logprobs for text in score_candidates(next_logits(model), PROMPT, candidates, image=IMAGE)]
    with opened(bundle) as runs:
        media = tuple(runs.media(picture()))
        ids = np.array(PROMPT)
        phi = phi_from_tokens(ids[None], IMAGE, reset)[0]
        keys = tuple(media[0].digest if token == IMAGE else token for token in PROMPT)
        prepared = Prepared(token_ids=ids, phi=phi, media=media, keys=keys)
        engine = Engine(runs.engines, runs.config, runs.manifest.limits)
        (found,) = engine.complete(engine.submit_score(prepared, candidates, wake=False))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_positions_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "v.bundle"
    flamingo_export.build(drawn_model(IDEFICS), out=bundle, parity="skip")
    with flamingo_export.load(bundle, threads=1) as model:
        known = IDEFICS.language_model.max_positions
        with pytest.raises(
            CapacityError, match=f"needs {known + 2} positions, the model has {known}. Generate at most 8 tokens"
        ):
            model.generate([1] + [5] * (known - 9), max_new_tokens=10)
        with pytest.raises(CapacityError, match="Use fewer shots"):
            model.generate([1] * (known + 5))
        near_the_end = model.generate([1] + [5] * (known - 4), beams=1)
        assert 1 <= len(near_the_end.token_ids) <= 3
        with pytest.raises(CapacityError, match="positions"):
            model.score([1] + [5] * (known - 3), [[7, 8, 9], [7]])


def test_no_limit_where_positions_have_none() -> None:
    assert VARIATIONS["openflamingo-mpt-like"].language_model.position_limit is None
    assert GenerateOptions(max_new_tokens=7).new_tokens(5, ShapeLimits(max_length=2048), None) == 7
