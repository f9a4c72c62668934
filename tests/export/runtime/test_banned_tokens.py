"""Several tokens that are never generated and several that end a text: search, scoring, engines' candidates, bundles of 0.1.0."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_gpu import add_engines, install
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import flamingo_export
from flamingo_export.backends.tensorrt.engine_contract import contract_of
from flamingo_export.bundle.earlier import completed
from flamingo_export.bundle.manifest import Manifest, read_manifest, write_manifest
from flamingo_export.errors import InputError
from flamingo_export.runtime.beam_search import BeamSearch
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.sampling import Sampling
from flamingo_export.runtime.search import StopRule
from flamingo_export.specs import LOG_SUM_EXP, TOP_IDS, TOP_VALUES
from flamingo_reference.config import ConfigError, ModelConfig, TokenIds
from flamingo_reference.input_format import IDEFICS
from flamingo_reference.search import Rules, beam_search

VOCAB, EOC, IMAGE = 17, 2, 3


def model_of(seed: int):
    """Logits that depend on the last two tokens; those that end a text or are banned are likely."""
    table = np.random.default_rng(seed).normal(0, 2, (VOCAB, VOCAB, VOCAB)).astype(np.float32)
    table[:, :, 2:7] += 1.5
    return lambda ids: table[ids[-2], ids[-1]].copy()


def driven(search, model, prompt):
    branches = [prompt]
    while (step := search.advance(np.stack([model(branch) for branch in branches]))) is not None:
        branches = [[*branches[parent], int(token)] for parent, token in zip(step.parents, step.tokens, strict=True)]
    return search.results()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000), beams=st.integers(1, 4), count=st.integers(1, 6), penalty=st.sampled_from([0.0, 1.0]),
    ends=st.sampled_from([(), (5,), (5, 6)]), banned=st.sampled_from([(), (4,), (4, 9)]),
)  # fmt: skip
def test_searches_are_those_of_the_reference(seed, beams, count, penalty, ends, banned):
    model = model_of(seed)
    rules = Rules(eoc=EOC, image=IMAGE, max_new_tokens=count, ends=ends, banned=banned)
    wanted = beam_search(
        lambda ids: np.stack([model(row) for row in ids.tolist()]), [1, 7], rules, beams=beams, length_penalty=penalty
    )
    assume(wanted.closest >= 1e-4)  # below, either choice is right
    rule = StopRule(eoc=EOC, banned=(IMAGE, *banned), max_new_tokens=count, ends=ends)
    found = driven(Sampling(rule) if beams == 1 else BeamSearch(rule, beams=beams, length_penalty=penalty), model, [1, 7])
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted.hypotheses]
    for mine, theirs in zip(found, wanted.hypotheses, strict=True):
        np.testing.assert_allclose(mine.token_logprobs, theirs.token_logprobs, atol=1e-5)
        assert not {IMAGE, *banned} & {*mine.token_ids}


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_several_ends_are_those_of_transformers(beams):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1,
        eos_token_id=EOC, pad_token_id=0, initializer_range=0.6,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    shift = torch.zeros(VOCAB)
    shift[[5, 6]], shift[[IMAGE, 4]] = 2.0, -torch.inf
    hook = llama.lm_head.register_forward_hook(lambda _, __, out: out + shift)
    ended = set()

    def model(ids):
        with torch.no_grad():
            return llama(torch.tensor([ids])).logits[0, -1].numpy().copy()

    for first in range(7, 17):
        prompt = [1, first, 8]
        out = llama.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.int64), num_beams=beams,
            num_return_sequences=beams, max_new_tokens=7, do_sample=False, length_penalty=0.0, early_stopping=False,
            eos_token_id=[EOC, 5, 6], pad_token_id=0,
        )  # fmt: skip
        rule = StopRule(eoc=EOC, banned=(IMAGE, 4), max_new_tokens=7, ends=(5, 6))
        found = driven(Sampling(rule) if beams == 1 else BeamSearch(rule, beams=beams), model, prompt)
        for mine, theirs in zip(found, out[:, 3:].tolist(), strict=True):
            assert list(mine.token_ids) == theirs[: len(mine.token_ids)]
            assert {*theirs[len(mine.token_ids) :]} <= {0, EOC}  # padding
            ended.add(mine.token_ids[-1])
    hook.remove()
    assert {5, 6} <= ended


def with_tokens(bundle: Path, **changes: object) -> Manifest:
    manifest = read_manifest(bundle)
    tokens = msgspec.structs.replace(manifest.config.tokens, **changes)
    manifest = msgspec.structs.replace(manifest, config=msgspec.structs.replace(manifest.config, tokens=tokens))
    write_manifest(bundle, manifest)
    return manifest


@pytest.fixture
def gpu(monkeypatch, tmp_path_factory):
    return install(monkeypatch, tmp_path_factory.mktemp("home"))


def test_scores_are_those_of_what_can_be_generated(tiny_bundle, tmp_path, gpu):
    """Of all one-token answers the probabilities sum to one, and banned ones have none."""
    bundle = add_engines(tiny_bundle, tmp_path / "x.bundle")
    with_tokens(bundle, banned=(9, 11))
    with flamingo_export.load(bundle, backend="onnxruntime") as model:
        scores = [each.logprob for each in model.score([1, 20, 21], [[token] for token in range(70)])]
        plain = flamingo_export.load(tiny_bundle).score([1, 20, 21], [[token] for token in range(70)])
    assert [index for index, score in enumerate(scores) if score == -np.inf] == [IMAGE, 9, 11]
    assert np.exp(scores).sum() == pytest.approx(1.0, abs=1e-5)
    assert np.exp(plain[9].logprob) > 1e-5


@pytest.mark.parametrize("beams", [1, 3])
def test_an_engine_that_bans_other_tokens_is_asked_for_all_logits(tiny_bundle, tmp_path, gpu, beams):
    """Its candidates leave out `<image>` only: 9 and 11 would come among them, and W + 1 of them might not be enough."""
    bundle = add_engines(tiny_bundle, tmp_path / "x.bundle")
    graph = read_manifest(bundle).graph("decoder")
    manifest = read_manifest(bundle)
    (record,) = (engine for engine in manifest.engines if engine.graph == "decoder")
    assert contract_of(manifest, graph, record).offered.output(TOP_IDS)
    with flamingo_export.load(bundle) as model:
        free = model.generate([1, 20, 21], beams=beams, max_new_tokens=6).token_ids
    banned = tuple(sorted({*free} - {2}))
    manifest = with_tokens(bundle, banned=banned)
    contract = contract_of(manifest, graph, record)
    names = {tensor.name for tensor in contract.offered.outputs}
    assert not names & {TOP_VALUES, TOP_IDS, LOG_SUM_EXP}
    assert {tensor.name for tensor in contract.spec.outputs} - names == {TOP_VALUES, TOP_IDS, LOG_SUM_EXP}
    answers = {}
    for backend in ("tensorrt-rtx", "onnxruntime"):
        with flamingo_export.load(bundle, backend=backend) as model:
            answers[backend] = model.generate([1, 20, 21], beams=beams, max_new_tokens=6)
    assert answers["tensorrt-rtx"].token_ids == answers["onnxruntime"].token_ids
    assert not {*banned} & {*answers["onnxruntime"].token_ids}
    np.testing.assert_allclose(
        answers["tensorrt-rtx"].token_logprobs, answers["onnxruntime"].token_logprobs, rtol=1e-4, atol=1e-5
    )


def test_engines_of_0_1_0_banned_one_token(tiny_bundle, tmp_path, gpu):
    bundle = add_engines(tiny_bundle, tmp_path / "x.bundle")
    raw = json.loads((bundle / "manifest.json").read_text())
    for engine in raw["engines"]:
        assert engine.pop("banned") == [IMAGE]
    del raw["config"]["tokens"]["banned"], raw["config"]["tokens"]["ends"]
    (bundle / "manifest.json").write_text(json.dumps(raw))
    manifest = read_manifest(bundle)
    assert manifest.config.tokens.never == (IMAGE,)
    (record,) = (engine for engine in manifest.engines if engine.graph == "decoder")
    assert contract_of(manifest, manifest.graph("decoder"), record).offered.output(TOP_IDS)


def test_an_idefics_bundle_of_0_1_0_bans_the_tag_around_images(tiny_bundle, tmp_path):
    manifest = msgspec.structs.replace(read_manifest(tiny_bundle), inputs=IDEFICS)
    assert completed(tiny_bundle, manifest) is manifest  # no tokenizer: nobody knows the tag's id
    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / "tokenizer" / "tokenizer.json"
    for text in ("{}", "no json", '{"added_tokens": [{"id": "x"}]}', '{"added_tokens": [{"id": 900, "content": "</s>"}]}'):
        path.write_text(text)
        assert completed(tmp_path, manifest) is manifest
    added = [{"id": 2, "content": "</s>"}, {"id": 69, "content": "<fake_token_around_image>"}]
    path.write_text(json.dumps({"added_tokens": added}))
    assert completed(tmp_path, manifest).config.tokens.never == (IMAGE, 69)
    assert completed(tmp_path, read_manifest(tiny_bundle)).config.tokens.never == (IMAGE,)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"banned": (70,)}, "tokens.banned 70 is outside the vocabulary of 70"),
        ({"ends": (-1,)}, "tokens.ends -1 is outside the vocabulary"),
        ({"banned": (4, 4)}, r"tokens.banned \(4, 4\) names a token twice"),
        ({"ends": (2,)}, r"tokens.ends \(2,\) names a token twice, or 2"),
        ({"banned": tuple(token for token in range(70) if token != 3)}, "leaves none of 70 tokens"),
    ],
)
def test_tokens_that_cannot_be(tiny_config: ModelConfig, changes, named):
    tokens = msgspec.structs.replace(tiny_config.tokens, **changes)
    with pytest.raises(ConfigError, match=named):
        msgspec.structs.replace(tiny_config, tokens=tokens).validate()


def test_beams_need_room_beside_the_ends(tiny_config: ModelConfig):
    tokens = TokenIds(pad=0, bos=1, eoc=2, image=3, ends=(4, 5))
    config = msgspec.structs.replace(tiny_config, tokens=tokens)
    GenerateOptions(beams=17).check(config)
    with pytest.raises(InputError, match="18 beams need a vocabulary of at least 72"):
        GenerateOptions(beams=18).check(config)
