"""docs/other_hosts.md: its programs give the tokens that this package's runtime gives."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from kinds import CLIP, READ
from PIL import Image
from variations import LLAMA

import flamingo_export
from flamingo_export.specs import subgraph_specs
from flamingo_reference.config import SIZES, ModelConfig

ROOT = Path(__file__).parents[2]
HOSTS = ROOT / "docs" / "other_hosts"
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flamingo_export.build(
        ROOT / "reference" / "flamingo_reference" / "nano" / "checkpoint",
        out=tmp_path_factory.mktemp("hosts") / "nano.bundle",
        parity="skip",
    ).path


@pytest.fixture(scope="module")
def asked(bundle: Path) -> tuple[Path, list[int], list[int]]:
    """Pixels as a file, the prompt's ids, and the ids that our own runtime finds."""
    image = ROOT / "examples" / "a.png"
    with flamingo_export.load(bundle, threads=1) as model:
        found = model.generate("<image>Output:", images=[image], beams=1, max_new_tokens=NEW_TOKENS)
        assert model.tokenizer is not None
        prompt = list(model.tokenizer.encode("<image>Output:"))
        eoc = model.config.tokens.eoc
    pixels = bundle.parent / "pixels.f32"
    subprocess.run([sys.executable, str(HOSTS / "pixels.py"), str(bundle), str(image), str(pixels)], check=True)
    return pixels, prompt, [token for token in found.token_ids if token != eoc]


def ids(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_pixels(asked: tuple[Path, list[int], list[int]]) -> None:
    """Nano's image is as large as its encoder's square, so nothing but the normalisation is left."""
    image = Image.open(ROOT / "examples" / "a.png").convert("RGB")
    nano = SIZES["nano"]
    assert image.size == (nano.vision.image_size,) * 2
    wanted = (np.asarray(image).transpose(2, 0, 1) / 255 - np.reshape(nano.pixel_mean, (3, 1, 1))) / np.reshape(
        nano.pixel_std, (3, 1, 1)
    )
    np.testing.assert_allclose(np.fromfile(asked[0], "<f4").reshape(wanted.shape), wanted, atol=1e-6)


def test_node(bundle: Path, asked: tuple[Path, list[int], list[int]], tmp_path: Path) -> None:
    modules = os.environ.get("ONNXRUNTIME_NODE_MODULES", "")
    if shutil.which("node") is None or not (Path(modules) / "onnxruntime-node").is_dir():
        pytest.skip("needs node, and ONNXRUNTIME_NODE_MODULES: a node_modules folder with onnxruntime-node")
    pixels, prompt, expected = asked
    (tmp_path / "node_modules").symlink_to(modules)
    shutil.copyfile(HOSTS / "greedy.mjs", tmp_path / "greedy.mjs")
    command = ["node", tmp_path / "greedy.mjs", bundle, pixels, NEW_TOKENS, *prompt]
    assert ids(subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)) == expected


def test_c_api(bundle: Path, asked: tuple[Path, list[int], list[int]], tmp_path: Path) -> None:
    include = os.environ.get("ONNXRUNTIME_INCLUDE", "")
    if shutil.which("g++") is None or not (Path(include) / "onnxruntime_c_api.h").is_file():
        pytest.skip("needs g++, and ONNXRUNTIME_INCLUDE: the folder of onnxruntime_c_api.h")
    pixels, prompt, expected = asked
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(library)
    program = tmp_path / "greedy"
    warnings = ["-Wall", "-Wextra", "-Werror", "-isystem", include]
    linked = [str(tmp_path / "libonnxruntime.so"), f"-Wl,-rpath,{tmp_path}"]
    subprocess.run(["g++", "-std=c++17", *warnings, str(HOSTS / "greedy.cpp"), "-o", str(program), *linked], check=True)
    config = flamingo_export.load(bundle, threads=1).config
    lm = config.language_model
    numbers = [lm.num_layers, lm.kv_heads, lm.head_size, config.vision.image_size, config.tokens.image, config.tokens.eoc]
    command = [program, bundle, pixels, NEW_TOKENS, *numbers, *prompt]
    assert ids(subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)) == expected


def test_inputs_for_polygraphy_are_in_range(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime takes them as they come from the script, and what is decoded after the prompt is finite."""
    monkeypatch.chdir(bundle)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession("decoder.onnx", options, providers=["CPUExecutionProvider"])
    calls = list(runpy.run_path(str(HOSTS / "decoder_inputs.py"))["load_data"]())
    assert [feeds["token_ids"].shape for feeds in calls] == [(1, 8), (1, 1)]
    for feeds in calls:
        assert set(feeds) == {each.name for each in session.get_inputs()} & set(feeds)
        (logits,) = session.run(["logits"], feeds)
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("config", [SIZES["nano"], LLAMA, CLIP, READ], ids=lambda config: config.name)
def test_the_page_names_what_goes_in_and_out(config: ModelConfig) -> None:
    """With the type and shape of each input of the decoder that is not a float."""
    page = (ROOT / "docs" / "other_hosts.md").read_text()
    specs = subgraph_specs(config)
    names = {tensor.name for spec in specs.values() for tensor in (*spec.inputs, *spec.outputs)}
    numbered = {"media": ".i", "past": ".j"}
    wanted = {
        re.sub(r"\.\d+$", numbered.get(name.split("_")[0], ""), name) for name in names if not name.startswith("present_")
    }
    assert {name for name in {*wanted, "present_*"} if f"`{name}`" not in page} == set()
    for tensor in specs["decoder"].inputs:
        if tensor.kind in ("int64", "bool"):
            shape = ", ".join(map(str, tensor.shape))
            assert re.search(rf"`{tensor.name}` (?:\| )?{tensor.kind} \[{shape}\]", page), tensor


def test_the_page_names_the_programs_that_there_are() -> None:
    page = (ROOT / "docs" / "other_hosts.md").read_text()
    for path in HOSTS.iterdir():
        assert f"(other_hosts/{path.name})" in page
