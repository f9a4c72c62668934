"""What a plan says of the memory of a build and of running the bundle, beside what these take, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
from variations import LLAMA

import flamingo_export
from flamingo_export import estimates
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.pipeline.plan import plan
from flamingo_export.quantize.policies import preset
from flamingo_export.sources.choice import CheckpointFolder, RandomWeights
from flamingo_export.sources.random_weights import RandomSource
from flamingo_export.weights import WeightIndex
from flamingo_reference.checkpoints.families.native import save_native
from flamingo_reference.config import ModelConfig, projector_config

_replace = msgspec.structs.replace
Given = CheckpointFolder | RandomWeights
LARGE = 20_000_000
"""In place of 100 million, so that the embedding and the head of a small model are made one at a time, as a large one's are."""
BUILD = """
import sys
import msgspec
import flamingo_export
from pathlib import Path
from flamingo_export.pipeline import write_weights
from flamingo_export.sources.choice import CheckpointFolder, RandomWeights
from flamingo_reference.config import ModelConfig

def resident(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) * 1024

write_weights.LARGE = int(sys.argv[1])
path, out, policy, storage = Path(sys.argv[2]), *sys.argv[3:]
if path.is_dir():
    given = CheckpointFolder(path=path)
else:
    given = RandomWeights(config=msgspec.json.decode(path.read_bytes(), type=ModelConfig))
before = resident("VmRSS:")
flamingo_export.build(given, out=out, policy=policy or None, storage=storage, uncalibrated=policy == "fp8", parity="skip")
print(before, resident("VmHWM:"))
"""


RUN = """
import sys
import numpy as np
import onnxruntime
import flamingo_export
from flamingo_export.runtime.model import Model

def resident():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024

before, image = resident(), np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
with flamingo_export.load(sys.argv[1], threads=1) as model:
    model.generate([1, model.config.tokens.image, *range(10, 60)], images=[image], beams=3, max_new_tokens=4)
    print(before, resident())
"""


def model(vocab: int) -> ModelConfig:
    """Matrices of 128 channels and more, an embedding and a head that are most of it."""
    return _replace(
        LLAMA,
        name="making",
        vision=_replace(LLAMA.vision, width=64, ffw_width=128),
        resampler=projector_config(num_latents=17, width=512),
        cross_attention=_replace(LLAMA.cross_attention, head_size=128, ffw_width=1024),
        language_model=_replace(
            LLAMA.language_model,
            width=512,
            head_size=128,
            ffw_width=1024,
            vocab_size=vocab,
            positions=_replace(LLAMA.language_model.positions, size=128),
        ),
        tokens=_replace(LLAMA.tokens, image=vocab),
    )


def taken_by_running(bundle: Path) -> int:
    """Bytes of resident memory that an open bundle takes after an answer, beyond those of an interpreter with its libraries."""
    done = subprocess.run([sys.executable, "-c", RUN, str(bundle)], stdout=subprocess.PIPE, text=True, check=True)
    before, after = map(int, done.stdout.splitlines()[-1].split())
    return after - before


def taken(source: Path, out: Path, policy: str, storage: str) -> tuple[int, int]:
    """Bytes of resident memory before a build, and at its peak."""
    command = [sys.executable, "-c", BUILD, str(LARGE), str(source), str(out), policy, storage]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    before, peak = map(int, done.stdout.splitlines()[-1].split())
    return before, peak


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Given]]:
    """A checkpoint in 16 bits, one in 32, and random weights that are drawn while a build writes them."""
    folder = tmp_path_factory.mktemp("sources")
    found: dict[str, tuple[Path, Given]] = {}
    config = model(80_000)
    random = RandomSource(config, 0)
    for kind, dtype in (("bf16", ml_dtypes.bfloat16), ("fp32", np.float32)):
        place = folder / kind
        save_native(place, config, ((name, random.read(name).astype(dtype)) for name in random.names()))
        found[kind] = (place, CheckpointFolder(path=place))
    (folder / "drawn").write_bytes(msgspec.json.encode(config))
    found["drawn"] = (folder / "drawn", RandomWeights(config=config))
    return found


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a run takes beside weights: arenas, buffers, the request."""
    out = tmp_path_factory.mktemp("small") / "b.bundle"
    flamingo_export.build(RandomWeights(config=model(300)), out=out, storage="fp32", parity="skip")
    return taken_by_running(out) - estimates.opened_weights(WeightIndex.read(out))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("given", "policy", "storage"),
    [
        ("bf16", "int4", "bf16"),
        ("bf16", "fp8", "bf16"),
        ("fp32", "", "fp16"),
        ("fp32", "", "fp32"),
        ("drawn", "", "bf16"),
    ],
)
def test_a_plan_says_what_a_build_takes(
    given: str,
    policy: str,
    storage: str,
    sources: dict[str, tuple[Path, Given]],
    beside: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within 30 %, of the whole and of what the weights take beyond the program."""
    monkeypatch.setattr("flamingo_export.pipeline.plan.LARGE", LARGE)
    path, source = sources[given]
    request = BuildRequest(
        source=source,
        out=tmp_path / "b.bundle",
        policy=preset(policy) if policy else None,
        storage=storage,  # type: ignore[arg-type]
        uncalibrated=True,
    )
    planned = plan(request)
    (step,) = planned.steps
    before, peak = taken(path, tmp_path / "b.bundle", policy, storage)
    print(f"{given} as {policy or storage}: {step.memory >> 20} MiB planned, {peak >> 20} taken, {before >> 20} of them before")
    assert 0.7 <= step.memory / peak <= 1.3
    assert 0.7 <= (step.memory - estimates.MAKING) / (peak - before) <= 1.3
    config = planned.config
    index = WeightIndex.read(tmp_path / "b.bundle")
    needed = estimates.on_cpu(config, index, requests=1, positions=128, media=4)
    planned_running, running = needed.total - estimates.PROGRAM + beside, taken_by_running(tmp_path / "b.bundle")
    print(f"running: {planned_running >> 20} MiB planned, {running >> 20} taken, {beside >> 20} of them beside weights")
    assert 0.7 <= planned_running / running <= 1.3
