"""Every kind of contrastive encoder: names, weights, graphs, and a build compared with the reference case by case."""

from __future__ import annotations

from pathlib import Path

import graph_contract
import msgspec
import pytest
from kinds import CLIP, KINDS, READ
from variations import GROUPED, MPT, drawn_model

from flamingo_export.precision import StorageType
from flamingo_export.specs import subgraph_specs, towers_of
from flamingo_export.weights.towers import LOGIT_SCALE
from flamingo_reference.config import ConfigError, ModelConfig, OwnVisionConfig
from flamingo_reference.contrastive_config import ClassToken
from flamingo_reference.model.subgraphs import empty_subgraph, subgraphs_of
from flamingo_reference.names import expected_tensors

each = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@each
def test_names_and_json(config: ModelConfig) -> None:
    graph_contract.names_and_json(config)


@each
def test_every_tensor_goes_into_one_weight_of_its_shape(config: ModelConfig) -> None:
    graph_contract.weights_from_tensors(config)


@each
def test_graphs_keep_the_contract(config: ModelConfig, tmp_path: Path) -> None:
    graph_contract.graphs_keep_the_contract(config, tmp_path / "v.bundle", unread=(LOGIT_SCALE,))
    for name, module in subgraphs_of(drawn_model(config)).items():
        assert name == "decoder" or empty_subgraph(config, name).state_dict().keys() == module.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["fp32", "fp16"])
@each
def test_built_engines_are_the_reference(config: ModelConfig, storage: StorageType, tmp_path: Path) -> None:
    report = graph_contract.build_passes_parity(config, tmp_path / "v.bundle", storage)
    measured = {row.tensor for row in report.rows}
    assert {"pooled", *(f"{tower.removesuffix('_tower')}_embedding" for tower in towers_of(config))} <= measured


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
