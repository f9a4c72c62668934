"""Checkpoints in published layouts: transformers and torch themselves read what the script writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel, IdeficsForVisionText2Text, MllamaForConditionalGeneration, MptForCausalLM

from flamingo_export.errors import CheckpointError
from flamingo_export.pipeline import plan as build_plan
from flamingo_export.pipeline import run as pipeline
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.sources.choice import CheckpointFolder
from flamingo_reference.checkpoints.families.llama_vision import config_from, plain_name
from flamingo_reference.checkpoints.families.recognition import recognise
from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.loading import CheckpointFiles, load
from flamingo_reference.config import SIZES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("write_checkpoint")


def test_idefics(script: ModuleType, tmp_path: Path) -> None:
    script.MODELS["idefics-tiny"](tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 5
    found = recognise(tmp_path)
    assert found.family.name == "idefics"
    kind: Any = IdeficsForVisionText2Text
    model, loading = kind.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, torch.from_numpy(found.reader.read(name).astype(np.float32)).to(torch.bfloat16)), name


def test_openflamingo(script: ModuleType, tmp_path: Path) -> None:
    script.MODELS["openflamingo-tiny"](tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model_state_dict"]
    reader = open_tensors(tmp_path / "checkpoint.pt")
    assert [f"module.{name}" for name in reader.names()] == list(saved)
    for name in reader.names():
        np.testing.assert_array_equal(reader.read(name), saved[f"module.{name}"].numpy())
    assert saved["module.perceiver.layers.0.0.to_q.weight"].std() == pytest.approx(32**-0.5, rel=0.1)
    kind: Any
    for folder, kind in (("mpt", MptForCausalLM), ("clip", CLIPVisionModel)):
        _, loading = kind.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not loading["unexpected_keys"]
        assert set(loading["missing_keys"]) <= {"lm_head.weight"}
    assert recognise(tmp_path / "checkpoint.pt").family.name == "openflamingo"
    assert recognise(tmp_path / "mpt").family.name == "mpt"
    assert recognise(tmp_path / "clip").family.name == "clip"


@pytest.mark.slow
def test_80b_is_planned_from_its_index(script: ModuleType, tmp_path: Path) -> None:
    """Names of every tensor and the config suffice; a build says which shards it lacks."""
    script.MODELS["idefics-80b-index"](tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors.index.json"]
    source = CheckpointFolder(path=tmp_path)
    plan = build_plan.plan(BuildRequest(source=source, out=tmp_path / "b.bundle"))
    published = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    # Less the norm of CLIP's pooled output; rotary tables, norms and embeddings are stored in fp32.
    assert plan.weight_bytes == pytest.approx(published, rel=0.01)
    assert published == pytest.approx(2 * 80e9, rel=0.02)
    assert len(plan.absent) == 17
    with pytest.raises(CheckpointError, match=r"names files that are not there: model-00001-of-00017\.safetensors"):
        pipeline.build(BuildRequest(source=source, out=tmp_path / "b.bundle"))


def test_names_and_shapes_of_the_published_size(script: ModuleType) -> None:
    """IDEFICS-9B: the published model has 8.93 billion parameters (the config is from memory; the sum tells a slip of it)."""
    from transformers import IdeficsConfig

    shapes = script.meta_shapes(lambda: IdeficsForVisionText2Text(IdeficsConfig(**script.IDEFICS_9B)))
    assert shapes["model.gated_cross_attn_layers.7.cross_attn.k_proj.weight"] == (4096, 1280)
    assert shapes["model.perceiver_resampler.blocks.5.0.q_proj.weight"] == (1536, 1280)
    assert shapes["model.embed_tokens.additional_embedding.weight"] == (2, 4096)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == pytest.approx(8.93e9, rel=0.005)


@pytest.mark.parametrize("absent", ["transformers", "torch", "flamingo_export"])
def test_what_it_needs_is_said(absent: str, tmp_path: Path) -> None:
    code = f"""
import runpy, sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
def find(name, found=__import__("importlib.util").util.find_spec):
    return None if name == {absent!r} else found(name)
sys.meta_path.insert(0, Without())
import importlib.util
importlib.util.find_spec = find
sys.argv = ["write_checkpoint.py", "idefics-tiny", "--out", {str(tmp_path / "x")!r}]
runpy.run_path({str(BENCHMARKS / "write_checkpoint.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"write_checkpoint.py: there is no {absent}. ")
    assert "PyTorch and transformers are needed" in done.stderr
    assert not (tmp_path / "x").exists()


def test_llama(script: ModuleType, tmp_path: Path) -> None:
    script.MODELS["llama-3.2-vision-tiny"](tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    checkpoint = load(CheckpointFiles(path=tmp_path))
    assert checkpoint.family.name == "llama_vision"
    assert (checkpoint.config.tokens.eoc, checkpoint.config.tokens.ends) == (3, (1, 2))
    assert checkpoint.inputs.prompts.template == script.LLAMA_TEMPLATE
    loaded: Any = MllamaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    model, loading = loaded
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    read = checkpoint.published.read
    for name, tensor in model.state_dict().items():
        found = read(plain_name(name)).astype(np.float32)
        assert torch.equal(tensor, torch.from_numpy(found).to(torch.bfloat16)), name


def test_the_11b_is_the_published_size(script: ModuleType) -> None:
    """Its config.json is read as the preset of that name."""
    config = config_from(script.LLAMA_11B, name="llama-3.2-11b-vision")
    preset = SIZES["llama-3.2-11b-vision"]
    tokens = msgspec.structs.replace(config.tokens, eoc=preset.tokens.eoc, ends=preset.tokens.ends)
    assert msgspec.structs.replace(config, tokens=tokens) == preset
