"""Every kind of contrastive encoder: names, weights, graphs, and a build compared with the reference case by case."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
import pytest
from kinds import CLIP, KINDS, READ
from variations import GROUPED, MPT, drawn_model

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.graphs import build_graph
from flamingo_export.precision import Precision, StorageType
from flamingo_export.specs import subgraph_specs, towers_of
from flamingo_export.validate.report.parity_report import read_report
from flamingo_export.weights import WeightIndex, bundle_weights
from flamingo_export.weights.towers import LOGIT_SCALE
from flamingo_reference.config import ConfigError, ModelConfig, OwnVisionConfig
from flamingo_reference.contrastive_config import ClassToken
from flamingo_reference.model.subgraphs import empty_subgraph, subgraphs_of
from flamingo_reference.names import expected_tensors

each = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@each
def test_names_and_json(config: ModelConfig) -> None:
    config.validate()
    assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config
    shapes = {name: tuple(tensor.shape) for name, tensor in drawn_model(config).state_dict().items()}
    assert shapes == expected_tensors(config)


@each
def test_every_tensor_goes_into_one_weight_of_its_shape(config: ModelConfig) -> None:
    state = {name: tensor.numpy() for name, tensor in drawn_model(config).state_dict().items()}
    made = bundle_weights(config)
    assert sorted(source for weight in made for source in weight.sources) == sorted(state)
    for weight in made:
        assert weight.make([state[source] for source in weight.sources]).shape == weight.shape, weight.name


@each
def test_graphs_keep_the_contract(config: ModelConfig, tmp_path: Path) -> None:
    index = WeightIndex.planned(config, Precision(storage="fp32"))
    bundle = tmp_path / "v.bundle"
    flamingo_export.build(drawn_model(config), out=bundle, parity="skip")
    specs, references = subgraph_specs(config), subgraphs_of(drawn_model(config))
    assert list(references) == list(specs)
    used: list[str] = []
    for name, spec in specs.items():
        onnx.checker.check_model(bundle / f"{name}.onnx", full_check=True)
        graph = build_graph(config, name, index).graph
        used += [weight for weight in graph.initializers if "constant" not in weight and "slopes" not in weight]
        assert [value.name for value in graph.inputs] == [tensor.name for tensor in spec.inputs]
        assert [value.name for value in graph.outputs] == [tensor.name for tensor in spec.outputs]
        assert all(value.uses() for value in graph.inputs), "an input is not read"
        assert list(references[name].inputs) == [tensor.name for tensor in spec.inputs]
        assert list(references[name].outputs) == [tensor.name for tensor in spec.outputs]
        assert name == "decoder" or empty_subgraph(config, name).state_dict().keys() == references[name].state_dict().keys()
    assert sorted(used) == sorted(name for name in index if name != LOGIT_SCALE)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["fp32", "fp16"])
@each
def test_built_engines_are_the_reference(config: ModelConfig, storage: StorageType, tmp_path: Path) -> None:
    out = tmp_path / "v.bundle"
    flamingo_export.build(drawn_model(config), out=out, storage=storage)
    report = read_report(out)
    assert report is not None
    failed = [(row.case, row.subgraph, row.tensor, row.error, row.limit, row.note) for row in report.rows if not row.passed]
    assert not failed, failed
    measured = {row.tensor for row in report.rows}
    assert {"pooled", *(f"{tower.removesuffix('_tower')}_embedding" for tower in towers_of(config))} <= measured
    assert read_manifest(out).parity.state == "passed"


@pytest.mark.parametrize("config", [MPT, GROUPED], ids=["vit", "nfnet"])
def test_a_model_without_one_is_as_it_was(config: ModelConfig) -> None:
    assert config.contrastive is None
    assert list(subgraph_specs(config)) == ["vision_encoder", "resampler", "media_kv", "decoder"]
    assert [output.name for output in subgraph_specs(config)["vision_encoder"].outputs] == ["features"]
    assert not any("contrastive" in name for name in expected_tensors(config))


def test_what_cannot_be_is_refused_by_name() -> None:
    assert READ.contrastive is not None
    assert CLIP.contrastive is not None
    with pytest.raises(ConfigError, match="the class token, which a vision encoder of kind 'nfnet' does not have"):
        msgspec.structs.replace(READ, contrastive=msgspec.structs.replace(READ.contrastive, pooling=ClassToken())).validate()
    assert CLIP.contrastive.text is not None
    uneven = msgspec.structs.replace(CLIP.contrastive, text=msgspec.structs.replace(CLIP.contrastive.text, num_heads=5))
    with pytest.raises(ConfigError, match=r"contrastive.text.num_heads 5 does not divide contrastive.text.width 24"):
        msgspec.structs.replace(CLIP, contrastive=uneven).validate()
    nothing = msgspec.structs.replace(CLIP.contrastive, joint_width=0, template="a photo")
    with pytest.raises(ConfigError, match=r"joint_width is 0.*one \{\} for the label"):
        msgspec.structs.replace(CLIP, contrastive=nothing).validate()
    own = OwnVisionConfig(image_size=28, num_patches=4, feature_width=32)
    with pytest.raises(ConfigError, match="of kind 'own' gives features only"):
        msgspec.structs.replace(CLIP, vision=own).validate()
