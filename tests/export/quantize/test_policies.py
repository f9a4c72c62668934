"""Presets, users' policies and what of them is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from flamingo_export.backends.registry import get_compiler
from flamingo_export.errors import BuildError
from flamingo_export.precision import Policy, Precision
from flamingo_export.quantize.policies import POLICIES, check_policy, for_model, preset, read_policy
from flamingo_export.sources import CheckpointSource
from flamingo_export.sources.choice import nano_checkpoint
from flamingo_export.weights import INPUT_SCALE, SCALE, bundle_weights, pieces
from flamingo_reference.config import SIZES


def stored(policy: Policy, size: str = "9b") -> dict[str, str]:
    """Element type of everything that a bundle of that size stores."""
    precision = Precision(storage="bf16", policy=policy)
    found = [piece for weight in bundle_weights(SIZES[size], precision) for piece in pieces(weight, precision)]
    return {piece.name: piece.element for piece in found}


def test_presets_leave_vision_norms_and_embeddings_as_they_are() -> None:
    for name in POLICIES:
        found = stored(preset(name))
        assert not {found[tensor] for tensor in found if tensor.startswith("vision_encoder/")} & {"fp8", "int8", "int4"}
        assert found["decoder/embedding"] == "bf16"
        assert found["decoder/norm/weight"] == found["decoder/layer.0/attention_norm/weight"] == "fp32"


def test_the_head_stays_under_fp8_and_has_8_bits_under_int8_and_int4() -> None:
    assert "decoder/head" not in stored(preset("fp8"))  # tied: the embedding is read
    for name in ("int8", "int4"):
        assert stored(preset(name))["decoder/head"] == "int8"


def test_every_product_of_the_decoder_is_quantised() -> None:
    """By its bytes: what is left are embedding, distances, norms and scales."""
    for name, element in (("fp8", "fp8"), ("int8", "int8"), ("int4", "int4")):
        found = stored(preset(name))
        products = [tensor for tensor in found if tensor.endswith("_proj") or ("/ffw_" in tensor and "norm" not in tensor)]
        products = [tensor for tensor in products if tensor.startswith("decoder/layer") and not tensor.endswith("scale")]
        assert len(products) == 40 * 4 + 10 * 4
        assert {found[tensor] for tensor in products} == {element}
        for tensor in products:
            assert found[tensor + SCALE] == "fp32"
            assert (tensor + INPUT_SCALE in found) == (name == "fp8")


def test_every_rule_of_a_preset_tells_its_reason() -> None:
    assert all(len(rule.reason) > 20 for name in POLICIES for rule in preset(name).rules)


def test_a_file_extends_a_preset_and_its_rules_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'extends = "int4"\n[[rules]]\nweights = "decoder/layer.0/*"\nformat = "int8"\nblock = 64\n'
        '[[rules]]\nweights = "decoder/layer.1/*"\nformat = "storage"\n[[rules]]\nweights = "decoder/layer.2/*"\nformat = "fp32"\n'
    )
    policy = read_policy(path)
    assert policy.name == "mine"
    found = stored(policy)
    name = "decoder/layer.{}/self_attention/qkv_proj"
    assert [found[name.format(layer)] for layer in range(4)] == ["int8", "bf16", "fp32", "int4"]
    assert Precision(storage="bf16", policy=policy).key != Precision(storage="bf16", policy=preset("int4")).key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[rules]]\nweights = "decoder/*"\nformat = "int3"\n', "int3"),
        (
            '[[rules]]\nweights = "decoder/*"\nformat = "int8"\nblock = 48\n',
            "block 48, expected a power of two from 16 to 1024",
        ),
        ('[[rules]]\nweights = "decoder/*"\nformat = "int4"\n', "block 0"),
        ('[[rules]]\nweights = "decoder/*"\nformat = "fp8"\nblock = 32\n', "has a block, which fp8 has not"),
        ('extends = "int5"\n', "'int5' is not a policy; there are fp8, int8, int4"),
        ('wieghts = "x"\n', "wieghts"),
        ("[[rules\n", "is not a policy"),
        (f"x = {'[' * 3000}{']' * 3000}\n", "is not a policy"),
        (f"x = {'9' * 5000}\n", "is not a policy"),
        ('name = "x"\n', "quantises nothing: it has no rules"),
    ],
)
def test_a_bad_file_is_refused_with_its_fault(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(BuildError, match=words):
        read_policy(path)
    with pytest.raises(BuildError, match="cannot be read"):
        read_policy(tmp_path / "none.toml")


def test_a_rule_that_matches_nothing_is_named_with_what_there_is() -> None:
    names = [weight.name for weight in bundle_weights(SIZES["nano"]) if weight.product]
    policy = preset("int4")
    check_policy(policy, names)
    wrong = msgspec.structs.replace(policy.rules[0], weights="decoder/layers.0/*")
    with pytest.raises(BuildError, match=r"decoder/layers\.0/\*.*there are decoder/layer\.0/"):
        check_policy(msgspec.structs.replace(policy, rules=(*policy.rules, wrong)), names)


def test_a_preset_for_a_text_tower_serves_a_model_without_one() -> None:
    """As when weights without towers are put into a bundle's policy."""
    with_towers = CheckpointSource(nano_checkpoint()).config
    policy = for_model(preset("int8"), with_towers)
    assert policy != preset("int8")
    without = [weight.name for weight in bundle_weights(SIZES["nano"]) if weight.product]
    check_policy(policy, without)


def test_fp8_is_refused_where_the_target_has_none() -> None:
    compiler = get_compiler("tensorrt-rtx")
    compiler.check_policy(preset("fp8"), "sm89")
    compiler.check_policy(preset("int4"), "sm86")
    with pytest.raises(BuildError, match=r"sm86 has no units for.*--int8 or --int4"):
        compiler.check_policy(preset("fp8"), "sm86")
