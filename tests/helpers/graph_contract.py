"""What holds for every kind of model and of contrastive encoder, on whatever its config: called by the tests of each."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
from variations import drawn_model

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.graphs import build_graph
from flamingo_export.precision import Precision, StorageType
from flamingo_export.specs import subgraph_specs
from flamingo_export.validate.report.parity_report import ParityReport, read_report
from flamingo_export.weights import WeightIndex, bundle_weights
from flamingo_reference.config import ModelConfig
from flamingo_reference.model.subgraphs import subgraphs_of
from flamingo_reference.names import expected_tensors


def names_and_json(config: ModelConfig) -> None:
    """A config survives JSON, and lists the tensors that its model has."""
    config.validate()
    assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config
    shapes = {name: tuple(tensor.shape) for name, tensor in drawn_model(config).state_dict().items()}
    assert shapes == expected_tensors(config)


def weights_from_tensors(config: ModelConfig, shared: tuple[str, ...] = ()) -> None:
    """Every tensor goes into one weight, of the shape that was announced. shared: how names begin and end that may go into two."""
    state = {name: tensor.numpy() for name, tensor in drawn_model(config).state_dict().items()}
    made = bundle_weights(config)
    sources = [source for weight in made for source in weight.sources]
    assert sorted(set(sources)) == sorted(state)
    twice = {source for source in sources if sources.count(source) > 1}
    assert not twice or (shared and all(source.startswith(shared[0]) and source.endswith(shared[1]) for source in twice))
    for weight in made:
        assert weight.make([state[source] for source in weight.sources]).shape == weight.shape, weight.name


def graphs_keep_the_contract(config: ModelConfig, bundle: Path, unread: tuple[str, ...] = ()) -> None:
    """Graphs have the inputs and outputs of their specs, read each input, and use each weight once. unread: weights that no graph reads."""
    index = WeightIndex.planned(config, Precision(storage="fp32"))
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
    assert sorted(used) == sorted(name for name in index if name not in unread)


def build_passes_parity(config: ModelConfig, out: Path, storage: StorageType) -> ParityReport:
    """The report of a build, each of whose rows is within its tolerance."""
    flamingo_export.build(drawn_model(config), out=out, storage=storage)
    report = read_report(out)
    assert report is not None
    failed = [(row.case, row.subgraph, row.tensor, row.error, row.limit, row.note) for row in report.rows if not row.passed]
    assert not failed, failed
    assert read_manifest(out).parity.state == "passed"
    return report
