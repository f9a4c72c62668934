"""Which matrices cost most when they are quantised: an outlier planted in one, and the whole model with hooks of the test's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch

from flamingo_calibration import calibrate, shipped_samples, source_tokenizer
from flamingo_calibration.samples import check_samples
from flamingo_export.errors import BuildError, CalibrationError
from flamingo_export.precision import Policy, Precision, Rule
from flamingo_export.quantize.policies import POLICIES, policy_text, preset, read_policy
from flamingo_export.runtime.media import load_medium
from flamingo_export.sensitivity import Sensitivity, measure, suggest
from flamingo_export.sources import CheckpointSource, LiveSource
from flamingo_export.sources.choice import nano_checkpoint
from flamingo_reference.config import NANO
from flamingo_reference.model import Flamingo

pytestmark = pytest.mark.slow

MATRIX = "decoder/layer.2/ffw_up"
FP32_NOISE = 2e-3
"""Of an error of some percent: differences of fp32 numbers that agree in their first four digits."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def measured(source: Any, policy: Policy, **options: Any) -> Sensitivity:
    spelled = source_tokenizer(source)
    samples = shipped_samples(source.config, spelled, source.inputs)
    precision = Precision(storage="fp32", policy=policy)
    return measure(source, samples, tokenizer=spelled, precision=precision, **options)


@pytest.fixture(scope="module")
def of_nano() -> Callable[[str], Sensitivity]:
    """Trained nano under a preset, measured once."""
    return cache(lambda name: measured(CheckpointSource(nano_checkpoint()), preset(name)))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from flamingo_export.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["sensitivity", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(("name", "factor"), [("int8", 100.0), ("int4", 100.0), ("fp8", 1e5)])
def test_a_channel_scaled_by_a_hundred_comes_out_on_top(name: str, factor: float) -> None:
    """The others' weights lose their bits to it. E4M3, which is a floating format, reaches 17 octaves: there it takes more than a hundred."""
    model = Flamingo.from_checkpoint(nano_checkpoint())
    layer: Any = model.language_model.layers[2]
    with torch.no_grad():
        # As much less in the product's input as it is more in the weights: the unquantised model stays what it was.
        layer.ffw_up.weight[:, 9] *= factor
        layer.ffw_norm.weight[9] /= factor
    found = measured(LiveSource(model), preset(name), memory=0)
    assert found.matrices[0].name == MATRIX
    assert max(found.layers, key=lambda each: each.error).name == "decoder/layer.2"
    suggestion = suggest(found)
    assert suggestion is not None
    assert suggestion.matrices[0] == MATRIX
    assert found.kl is None
    assert "of memory, 0 MiB may be used" in found.no_kl


def whole_hidden(model: Flamingo, sample: Any, upto: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states before and after LM layer `upto`, by the whole model."""
    pixels = [load_medium(medium, model.config).pixels for medium in sample.media]
    parameter = next(model.parameters())
    none = torch.zeros(0, model.config.resampler.num_latents, model.config.resampler.width).to(parameter)
    latents = torch.cat([none, *(model.latents(torch.from_numpy(frames[None]).to(parameter)) for frames in pixels)])
    media, rows = model.media_kv(latents), torch.arange(len(pixels))[None]
    hidden = model.language_model.embedding(torch.from_numpy(sample.token_ids)[None])
    for j, layer in enumerate(model.language_model.layers):
        if j in model.config.gated_layers:
            i = model.config.gated_layers.index(j)
            hidden = model.gated_blocks()[i](hidden, *media[i], rows, torch.from_numpy(sample.phi)[None])
        before, hidden = hidden, layer(hidden)
        if j == upto:
            return before, hidden
    raise AssertionError(upto)


def test_one_matrix_agrees_with_brute_force_on_the_whole_model(of_nano: Callable[[str], Sensitivity]) -> None:
    """In fp64, E4M3 by ml_dtypes, scales worked out here: powers of two per output channel, one for the input."""
    source = CheckpointSource(nano_checkpoint())
    spelled = source_tokenizer(source)
    samples = shipped_samples(NANO, spelled)
    table = calibrate(source, samples, tokenizer=spelled)
    exact = Flamingo.from_checkpoint(nano_checkpoint()).double().eval()
    rounded = Flamingo.from_checkpoint(nano_checkpoint()).double().eval()

    def e4m3(values: np.ndarray, scale: Any) -> np.ndarray:
        kept = np.clip((values / scale).astype(np.float32), -448, 448)
        return kept.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale

    product: Any = rounded.language_model.layers[2].ffw_up
    weight = product.weight.detach().numpy()
    product.weight.data = torch.from_numpy(
        e4m3(weight, 2.0 ** np.ceil(np.log2(np.abs(weight).max(axis=1, keepdims=True) / 448)))
    )
    scale = 2.0 ** np.ceil(np.log2(table.tensors[MATRIX].amax / 448))
    product.register_forward_pre_hook(lambda _, given: (torch.from_numpy(e4m3(given[0].detach().numpy(), scale)),))
    change = added = 0.0
    with torch.no_grad():
        for sample in check_samples(samples, source, spelled).samples:
            before, after = whole_hidden(exact, sample, 2)
            _, other = whole_hidden(rounded, sample, 2)
            change += float(((other - after) ** 2).sum())
            added += float(((after - before) ** 2).sum())
    found = next(each for each in of_nano("fp8").matrices if each.name == MATRIX)
    # Activations at a rounding's edge may fall to either side in fp32 and fp64.
    assert found.error == pytest.approx((change / added) ** 0.5, rel=FP32_NOISE)


def test_divergence_is_that_of_the_whole_model_with_the_layer_quantised(of_nano: Callable[[str], Sensitivity]) -> None:
    """int8 of the head alone: weights in blocks of 64 or 128 by hand, the input too, in fp64."""
    source = CheckpointSource(nano_checkpoint())
    spelled = source_tokenizer(source)
    model = Flamingo.from_checkpoint(nano_checkpoint()).double().eval()
    width = NANO.language_model.width
    block = next(size for size in (128, 64, 32, 16) if width % size == 0)

    def rounded_in_blocks(values: np.ndarray) -> np.ndarray:
        blocks = values.reshape(*values.shape[:-1], -1, block)
        scale = np.abs(blocks).max(-1, keepdims=True) / 127
        return (np.rint(blocks / np.where(scale > 0, scale, 1)) * scale).reshape(values.shape)

    head = model.language_model.embedding.weight.detach().numpy()
    total = 0.0
    samples = check_samples(shipped_samples(NANO, spelled), source, spelled).samples
    with torch.no_grad():
        for sample in samples:
            hidden = whole_hidden(model, sample, NANO.language_model.num_layers - 1)[1]
            normed = model.language_model.norm(hidden)[0].numpy()
            expected, actual = (
                torch.from_numpy(logits).log_softmax(-1)
                for logits in (normed @ head.T, rounded_in_blocks(normed) @ rounded_in_blocks(head).T)
            )
            total += float((expected.exp() * (expected - actual)).sum())
    found = of_nano("int8")
    of_head = next(layer for layer in found.layers if layer.name == "decoder/head")
    assert of_head.kl == pytest.approx(total / found.tokens, rel=0.02)
    assert found.kl is not None
    assert found.kl is not None
    assert of_head.kl is not None
    assert found.kl > of_head.kl


@pytest.mark.parametrize("name", POLICIES)
def test_every_quantised_matrix_is_measured_once_and_fewer_bits_cost_more(
    of_nano: Callable[[str], Sensitivity], name: str
) -> None:
    found = of_nano(name)
    names = [each.name for each in found.matrices]
    expected = 6 * 4 + 3 * 4 + 6 + 10  # LM layers, gated blocks, their media, the resampler
    expected += 2 * (name != "fp8")  # which leaves the resampler's first and the head as they are
    assert len(names) == len(set(names)) == expected
    assert [each.error for each in found.matrices] == sorted((each.error for each in found.matrices), reverse=True)
    assert all(0 < each.error < 0.5 for each in found.matrices)
    for layer in found.layers:
        alone = [each.error for each in found.matrices if each.layer == layer.name]
        assert max(alone) < 1.2 * layer.error
        assert layer.error < 1.5 * sum(alone)
        assert 0 < layer.share <= 1.5
        assert layer.kl is not None
    by_name = {each.name: each.error for each in of_nano("int8").matrices}
    if name == "int4":
        assert all(each.error > 3 * by_name[each.name] for each in found.matrices if each.element == "int4")
        assert all(each.error == by_name[each.name] for each in found.matrices if each.element == "int8")


def test_operands_of_attention_are_measured_one_by_one() -> None:
    policy = Policy(name="attention", attention="fp8")
    found = measured(CheckpointSource(nano_checkpoint()), policy, memory=0)
    assert {each.name for each in found.matrices} == {
        f"decoder/layer.{layer}/self_attention/{kind}" for layer in range(6) for kind in "qkv"
    }
    assert len({each.error for each in found.matrices}) == 18
    assert all(each.kind == "operand" and 1e-4 < each.error < 0.1 for each in found.matrices)
    worse = (msgspec.structs.replace(found.matrices[0], error=1.0), *found.matrices[1:])
    suggestion = suggest(msgspec.structs.replace(found, matrices=worse))
    assert suggestion is not None
    assert 'attention = "storage"' in suggestion.text


def test_keys_and_values_of_media_are_measured(tmp_path: Path) -> None:
    """Those of the first gated block by hand, in fp64: it takes the embedding, and adds to that."""
    policy = Policy(name="media", media="fp8", attention="fp8")
    source = CheckpointSource(nano_checkpoint())
    spelled = source_tokenizer(source)
    samples = shipped_samples(NANO, spelled)
    table = calibrate(source, samples, tokenizer=spelled)
    found = measured(source, policy, calibration=table, memory=0)
    media = {each.name: each for each in found.matrices if each.name.startswith("media_kv/")}
    assert set(media) == {f"media_kv/layer.{i}/{kind}" for i in range(3) for kind in "kv"}
    assert all(each.kind == "operand" and each.error > 1e-4 for each in media.values())

    model = Flamingo.from_checkpoint(nano_checkpoint()).double().eval()
    change = {"k": 0.0, "v": 0.0}
    added = 0.0
    with torch.no_grad():
        for sample in check_samples(samples, source, spelled).samples:
            pixels = [load_medium(medium, NANO).pixels for medium in sample.media]
            none = torch.zeros(0, NANO.resampler.num_latents, NANO.resampler.width).double()
            latents = torch.cat([none, *(model.latents(torch.from_numpy(frames[None]).double()) for frames in pixels)])
            exact = dict(zip("kv", model.media_kv(latents)[0], strict=True))
            hidden = model.language_model.embedding(torch.from_numpy(sample.token_ids)[None])
            rest = torch.arange(len(pixels))[None], torch.from_numpy(sample.phi)[None]
            after = model.gated_blocks()[0](hidden, *exact.values(), *rest)
            added += float(((after - hidden) ** 2).sum())
            for kind in "kv":
                scale = 2.0 ** np.ceil(np.log2(table.tensors[f"media_kv/layer.0/{kind}"].amax / 448))
                codes = np.clip(exact[kind].numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
                rounded = exact | {kind: torch.from_numpy(codes.astype(np.float64) * scale)}
                change[kind] += float(((model.gated_blocks()[0](hidden, *rounded.values(), *rest) - after) ** 2).sum())
    for kind in "kv":
        assert media[f"media_kv/layer.0/{kind}"].error == pytest.approx((change[kind] / added) ** 0.5, rel=FP32_NOISE)

    # What stands out goes back to the storage type, and nothing else does.
    for name, kept in (("media_kv/layer.1/v", ("fp8", "storage")), ("decoder/layer.1/self_attention/q", ("storage", "fp8"))):
        worse = tuple(msgspec.structs.replace(each, error=1.0 if each.name == name else 0.01) for each in found.matrices)
        suggestion = suggest(msgspec.structs.replace(found, matrices=worse))
        assert suggestion is not None
        (tmp_path / "mine.toml").write_text(suggestion.text)
        read = read_policy(tmp_path / "mine.toml")
        assert (read.attention, read.media) == kept


def test_the_suggested_policy_keeps_what_stands_out_and_costs_what_it_says(
    of_nano: Callable[[str], Sensitivity], tmp_path: Path
) -> None:
    from flamingo_export.weights import bundle_weights, stored_bytes

    found = of_nano("int4")
    worse = tuple(
        msgspec.structs.replace(each, error=5.0) if each.name in (MATRIX, "decoder/head") else each for each in found.matrices
    )
    suggestion = suggest(msgspec.structs.replace(found, matrices=worse))
    assert suggestion is not None
    assert set(suggestion.matrices) >= {MATRIX, "decoder/head"}
    (tmp_path / "mine.toml").write_text(suggestion.text)
    policy = read_policy(tmp_path / "mine.toml")
    assert [rule.format for rule in policy.rules if rule.weights == MATRIX] == ["int8"]  # int4 to 8 bits
    rule = policy.rule("decoder/head")
    assert rule is not None
    assert rule.format == "storage"  # int8 to the storage type
    shipped = CheckpointSource(nano_checkpoint()).config  # with its towers
    sizes = [
        sum(stored_bytes(weight, precision) for weight in bundle_weights(shipped, precision))
        for precision in (found.precision, msgspec.structs.replace(found.precision, policy=policy))
    ]
    assert suggestion.extra_bytes == sizes[1] - sizes[0]
    assert suggestion.weight_bytes == sizes[0]
    level = tuple(msgspec.structs.replace(each, error=0.01) for each in found.matrices)
    assert suggest(msgspec.structs.replace(found, matrices=level)) is None


def test_a_policy_as_text_is_read_back_as_it_was(tmp_path: Path) -> None:
    rule = Rule(weights='decoder/layer.1/"ffw"\\*', format="int8", block=32, reason='é "quoted" \\ and\ttab')
    own = Policy(name="own", rules=(rule, Rule(weights="media_kv/*", format="fp8")), attention="fp8", media="fp8")
    for policy in (own, msgspec.structs.replace(preset("int4"), name="own")):
        (tmp_path / "own.toml").write_text(policy_text(policy), encoding="utf-8")
        assert read_policy(tmp_path / "own.toml") == policy
    (tmp_path / "own.toml").write_text(policy_text(preset("int8"), [rule]), encoding="utf-8")
    assert read_policy(tmp_path / "own.toml").rules == (*preset("int8").rules, rule)


class Page(HTMLParser):
    """Checks that elements are closed in order; keeps ids, tags and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(of_nano: Callable[[str], Sensitivity]) -> None:
    from flamingo_export.sensitivity.sensitivity_page import render_html

    found = of_nano("int4")
    text = render_html(found, suggest(found))
    page = Page(text)
    assert {"suggestion", "matrices", "layers", "all"} <= set(page.ids)
    assert all(page.ids.count(address.removeprefix("#")) == 1 for address in page.addresses)
    assert all(page.ids.count(section) == 1 for section in ("suggestion", "matrices", "layers", "all"))
    assert text.count('<div class="plot">') == 3
    assert not {"script", "link", "img"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert all(each.name in text for each in found.matrices)
    alone = msgspec.structs.replace(
        found, kl=None, no_kl="it takes <much>", layers=tuple(msgspec.structs.replace(each, kl=None) for each in found.layers)
    )
    text = render_html(alone, None)
    assert text.count('<div class="plot">') == 2
    assert "it takes &lt;much&gt;" in text


def test_the_command_on_a_bundle(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    import flamingo_export
    from flamingo_export.sources.choice import source_for_size

    bundle, page, mine = tmp_path / "nano.bundle", tmp_path / "s.html", tmp_path / "mine.toml"
    flamingo_export.build(source_for_size("nano"), out=bundle, parity="skip")
    code, out, err = cli(bundle, "--fp8", "--html", page, "--suggest", mine)
    assert code == 0, err
    assert "decoder/layer.0/cross_attention/ffw_down" in out
    assert "to keep" in out.lower()
    assert "<svg" in page.read_text()
    assert read_policy(mine).rules[: len(preset("fp8").rules)] == preset("fp8").rules
    before = mine.read_text()
    code, _, err = cli(bundle, "--fp8", "--suggest", mine)
    assert (code, mine.read_text()) == (1, before)
    assert "exists. Choose another file for --suggest" in err
    code, out, err = cli(bundle, "--policy", mine, "--json")
    assert code == 0, err
    told = json.loads(out)
    kept = {rule.weights for rule in read_policy(mine).rules if rule.reason.startswith("adds an error")}
    assert kept
    assert not kept & {each["name"] for each in told["sensitivity"]["matrices"]}
    code, _, err = cli(bundle)
    assert code == 2
    assert "nothing is quantised" in err


def test_bad_input(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    none = tmp_path / "none.toml"
    none.write_text('[[rules]]\nweights = "decoder/*"\nformat = "storage"\n')
    idle = tmp_path / "idle.toml"
    idle.write_text('extends = "int8"\n[[rules]]\nweights = "decoder/layers.0/*"\nformat = "storage"\n')
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"prompt": "x"}\nnothing\n')
    for arguments, code, message in (
        ((), 2, "give either --size or --checkpoint"),
        (("--size", "nano"), 2, "nothing is quantised"),
        (("--size", "nano", "--fp8", "--int4"), 2, "exclude each other"),
        (("x.bundle", "--size", "nano", "--fp8"), 2, "a bundle has its weights"),
        (("x.bundle", "--lm", "y", "--fp8"), 2, "add --checkpoint"),
        ((tmp_path / "x.bundle", "--fp8"), 1, "x.bundle"),
        (("--size", "nano", "--policy", none), 1, "policy 'none' quantises no matrix of nano"),
        (("--size", "nano", "--policy", idle), 1, "match no matrix of this model"),
        (("--size", "nano", "--int8", "--data", lines), 1, "1 of 2 samples cannot be used: line 2: not JSON"),
    ):
        found = cli(*arguments)
        assert found[0] == code, (arguments, found)
        assert message in found[2].replace("\n", " "), (arguments, found)


def test_a_table_of_other_weights_is_refused() -> None:
    other = Flamingo.from_checkpoint(nano_checkpoint())
    with torch.no_grad():
        other.language_model.norm.weight[0] += 1
    source = LiveSource(other)
    table = calibrate(source, shipped_samples(NANO, None), tokenizer=None)
    with pytest.raises(CalibrationError, match="of other weights"):
        measured(CheckpointSource(nano_checkpoint()), preset("fp8"), calibration=table)
    with pytest.raises(BuildError, match="quantises no matrix"):
        measured(source, Policy(name="nothing"))


def test_a_bundle_whose_weights_are_not_at_hand(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    import flamingo_export
    from flamingo_export.sources.choice import CheckpointFolder

    model = Flamingo.from_checkpoint(nano_checkpoint())
    with torch.no_grad():
        model.language_model.norm.weight[0] += 1
    model.save(tmp_path / "ckpt")
    flamingo_export.build(CheckpointFolder(path=tmp_path / "ckpt"), out=tmp_path / "n.bundle", parity="skip")
    code, _, err = cli(tmp_path / "n.bundle", "--int8")
    assert code == 1
    assert "Name a checkpoint with the same weights: --checkpoint DIR" in err
    code, _, err = cli(tmp_path / "n.bundle", "--int8", "--checkpoint", nano_checkpoint())
    assert code == 1
    assert "has other weights" in err
    shutil.rmtree(tmp_path / "n.bundle")


def test_without_torch_it_says_so() -> None:
    script = """
import sys
sys.modules["torch"] = None
from flamingo_export.cli import main
sys.exit(main(["sensitivity", "--size", "nano", "--fp8"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "sensitivity runs the PyTorch reference. Install it: pip install '.[torch]'" in done.stderr
