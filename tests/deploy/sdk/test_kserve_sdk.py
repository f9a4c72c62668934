"""The InferenceService as KServe's own SDK reads it: every field is one of its model's, and of the right kind.

make test-deploy
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

kserve = pytest.importorskip("kserve", reason="needs KServe's SDK in an environment of its own: make test-deploy")
yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.deploy


def model(name: str) -> Any:
    from kubernetes import client

    return getattr(kserve, name, None) or getattr(client, name)


def faults(value: Any, kind: str, path: str) -> list[str]:
    """Where a value does not fit a type as the SDK writes it: V1Container, list[V1EnvVar], dict(str, str), int."""
    if kind in ("object", "IntOrString", "datetime") or kind.lower().startswith("dict"):
        return [] if kind == "object" or isinstance(value, dict | int | str) else [f"{path}: {value!r} is not {kind}"]
    inner = re.fullmatch(r"[Ll]ist\[(.+)\]", kind)
    if inner:
        if not isinstance(value, list):
            return [f"{path}: {value!r} is not a list"]
        return [fault for number, each in enumerate(value) for fault in faults(each, inner[1], f"{path}[{number}]")]
    plain: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}
    if kind in plain:
        right = isinstance(value, plain[kind]) and (kind == "bool" or not isinstance(value, bool))
        return [] if right else [f"{path}: {value!r} is not {kind}"]
    types, names = model(kind).openapi_types, model(kind).attribute_map
    attributes = {name: attribute for attribute, name in names.items()}
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is not a {kind}"]
    found = [f"{path}.{name} is not a field of {kind}" for name in value if name not in attributes]
    for name, each in value.items():
        if name in attributes:
            found += faults(each, types[attributes[name]], f"{path}.{name}")
    return found


@pytest.fixture
def document() -> Any:
    """Of the folder that FLAMINGO_KSERVE names: the SDK and the package want different versions of psutil, so it was written before."""
    if "FLAMINGO_KSERVE" not in os.environ:
        pytest.skip("FLAMINGO_KSERVE names no folder of `package --for kserve`: make test-deploy")
    return yaml.safe_load((Path(os.environ["FLAMINGO_KSERVE"]) / "inferenceservice.yaml").read_text(encoding="utf-8"))


def test_every_field_is_one_of_kserves(document):
    assert faults(document, "V1beta1InferenceService", "inferenceservice") == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda predictor: predictor.update(minReplica=1), "minReplica is not a field"),
        (lambda predictor: predictor.update(maxReplicas="4"), "is not int"),
        (lambda predictor: predictor["containers"][0].update(arg=[]), "arg is not a field"),
    ],
)
def test_what_is_wrong_would_be_found(document, change, expected):
    change(document["spec"]["predictor"])
    assert expected in "; ".join(faults(document, "V1beta1InferenceService", "inferenceservice"))


def built(value: Any, kind: str) -> Any:
    """The SDK's own object, whose constructors check required fields."""
    inner = re.fullmatch(r"[Ll]ist\[(.+)\]", kind)
    if inner:
        return [built(each, inner[1]) for each in value]
    if not kind.startswith("V1"):
        return value
    types, names = model(kind).openapi_types, model(kind).attribute_map
    attributes = {name: attribute for attribute, name in names.items()}
    return model(kind)(**{attributes[name]: built(each, types[attributes[name]]) for name, each in value.items()})


def test_the_sdk_makes_its_own_object_of_it(document):
    found = built(document, "V1beta1InferenceService")
    assert found.kind == kserve.constants.KSERVE_KIND_INFERENCESERVICE
    assert found.spec.predictor.max_replicas == 4
    assert found.spec.predictor.containers[0].name == "kserve-container"
    del document["spec"]["predictor"]["containers"][0]["name"]
    with pytest.raises(Exception, match="name"):
        built(document, "V1beta1InferenceService")
