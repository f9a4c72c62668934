"""Settings files that came with a checkpoint, changed or left out at random: it loads, or an error of ours says what is wrong. Nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_models import their_model as llama_model
from openflamingo_models import Theirs
from published_files import write_openflamingo
from safetensors.numpy import save_file

from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.loading import CheckpointFiles, load
from tests.families.test_idefics_files import flat, write
from tests.families.test_openflamingo_files import write_open_clip, write_otter
from tests.families.test_published_llama import write as write_llama

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([2**63, -(2**40), 10**400, 0.5, 1e308, float("nan"), float("inf")]),
    st.text(max_size=4), st.lists(st.integers(-2, 70), max_size=3), st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "fan_in_fan_out": False, "rank_pattern": {},
    "alpha_pattern": {"q_proj": 3}, "modules_to_save": None, "init_lora_weights": True, "bias": "none", "use_dora": False,
    "ensure_weight_tying": False, "layer_replication": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CheckpointFiles, Path]]:
    """Kind of a settings file -> the checkpoint, and the file."""
    root: Path = tmp_path_factory.mktemp("untrusted")
    idefics, _ = write(root / "idefics")
    (idefics / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 9], "suppress_tokens": [5], "bad_words_ids": [[4]]})
    )
    images = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [1.0, 1.0, 1.0],
        "image_size": 30,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (idefics / "preprocessor_config.json").write_text(json.dumps(images))
    old, _ = write(root / "old")
    flat(old)
    adapter = root / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": np.ones((2, 48), np.float32), f"{name}.lora_B.weight": np.ones((48, 2), np.float32)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))
    theirs = Theirs("mpt")
    otter = write_otter(root / "otter", theirs)
    clip = write_open_clip(root / "clip", theirs, "open_clip_model.safetensors", quick_gelu=True)
    of = msgspec.structs.replace(write_openflamingo(root / "of", theirs), vision_encoder=clip)
    plain = CheckpointFiles(path=idefics)
    llama = write_llama(root / "llama", llama_model().float(), shard="1GB")
    return {
        "generation": (plain, idefics / "generation_config.json"),
        "preprocessor": (plain, idefics / "preprocessor_config.json"),
        "adapter": (msgspec.structs.replace(plain, adapters=(adapter,)), adapter / "adapter_config.json"),
        "the old IDEFICS": (CheckpointFiles(path=old), old / "config.json"),
        "otter": (otter, otter.path / "config.json"),
        "open_clip": (of, clip / "open_clip_config.json"),
        "llama": (CheckpointFiles(path=llama), llama / "config.json"),
        "llama's images": (CheckpointFiles(path=llama), llama / "preprocessor_config.json"),
    }


def within(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every setting is, those within others too."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inner for place in ((*path, key), *within(each, (*path, key)))]


KINDS = ["generation", "preprocessor", "adapter", "the old IDEFICS", "otter", "open_clip", "llama", "llama's images"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_setting_of_another_kind_or_none(
    places: dict[str, tuple[CheckpointFiles, Path]], kind: str, data: st.DataObject
) -> None:
    files, path = places[kind]
    text = path.read_text()
    raw = json.loads(text)
    places_in = within(raw)
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, last = data.draw(st.sampled_from(places_in))
        holder = raw
        try:
            for key in outer:
                holder = holder[key]
            if data.draw(st.integers(0, 3)) == 0:
                del holder[last]
            else:
                holder[last] = data.draw(ODD)
        except (TypeError, KeyError, IndexError):  # within what the first change put there
            continue
    said = ""
    try:
        path.write_text(json.dumps(raw))
        load(files)
    except CheckpointError as error:
        said = str(error)
    finally:
        path.write_text(text)
    assert len(said) < 200_000  # every tensor that is missing is named


@pytest.mark.parametrize("kind", KINDS)
def test_they_load_as_they_are(places: dict[str, tuple[CheckpointFiles, Path]], kind: str) -> None:
    load(places[kind][0])
