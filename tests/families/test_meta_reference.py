"""Beside Meta's own code of Llama 3.2 Vision: vision to logits, and pixels.

What it computes is recorded in data/meta_llama.npz, and recorded anew where LLAMA_MODELS_PYTHON names an interpreter that has it
(`meta_oracle.py` says how): `LLAMA_MODELS_PYTHON=meta/bin/python python -m pytest tests/families/test_meta_reference.py`, or to write the
record, `python tests/families/test_meta_reference.py meta/bin/python`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "helpers")]

from llama_models import (
    IMAGE,
    PROMPTS,
    VOCAB,
    corrected,
    our_logits,
    our_model,
    pixels,
    their_config,
    their_logits,
    their_model,
)

from flamingo_export.runtime.tiles import arrangements_of, tiles_of

RECORDED = Path(__file__).parent / "data" / "meta_llama.npz"
ORACLE = Path(__file__).with_name("meta_oracle.py")
ARRANGEMENTS = arrangements_of(4)
TILE = 28
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Meta's rotary positions and norms are computed in fp32.
CLOSE = 3e-5


def theirs() -> Any:
    """transformers' model whose tables of tiles come of one grid, as Meta's code has them and published files were made; rotary positions
    scaled as Meta's code does."""
    config: Any = their_config()
    config.text_config.rope_parameters |= {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    model = their_model(config, seed=13)
    for name, table in grids(model).items():
        tables = [torch.zeros_like(table[0, 0]).repeat(4, 1, 1)]
        for rows, columns in ARRANGEMENTS:
            used = table[:rows, :columns].reshape(rows * columns, *table.shape[2:])
            tables.append(torch.cat([used, torch.zeros(4 - rows * columns, *used.shape[1:], dtype=used.dtype)]))
        with torch.no_grad():
            model.get_parameter(TABLES[name]).copy_(torch.stack(tables).flatten(1))
    return model


TABLES = {
    "position": "model.vision_model.gated_positional_embedding.tile_embedding.weight",
    "pre": "model.vision_model.pre_tile_positional_embedding.embedding.weight",
    "post": "model.vision_model.post_tile_positional_embedding.embedding.weight",
}


def grids(model: Any) -> dict[str, torch.Tensor]:
    """Embeddings of the places that a tile may have [4, 4, tokens, width]."""
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    generator = torch.Generator().manual_seed(14)
    return {
        name: torch.randn(4, 4, count, vision.hidden_size, generator=generator).double()
        for name, count in (("position", tokens), ("pre", 1), ("post", 1))
    }


def pictures() -> list[npt.NDArray[np.uint8]]:
    """60 pictures of random sizes, uint8 [H, W, 3]."""
    rng = np.random.default_rng(15)
    sizes = rng.integers(4, 140, (60, 2))
    return [rng.integers(0, 256, (int(height), int(width), 3), np.uint8) for height, width in sizes]


def given(model: Any) -> dict[str, Any]:
    """What Meta's code is told: weights by short names, sizes, prompts, images."""
    config = model.config
    vision, text = config.vision_config, config.text_config
    names = {
        "model.vision_model.": "vision.",
        "model.multi_modal_projector.": "projector.",
        "model.language_model.": "text.",
        "lm_head.": "head.",
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        long, short = next(pair for pair in names.items() if name.startswith(pair[0]))
        weights[f"w:{short}{name.removeprefix(long)}"] = tensor.numpy()
    width = text.hidden_size
    sizes = {
        "vision": {
            "max_num_tiles": 4,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "heads": vision.attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "n_global_layers": vision.num_global_layers,
            "global_model": True,
            "return_intermediate": list(vision.intermediate_layers_indices),
        },
        "features": vision.vision_output_dim,
        "text": {
            "dim": width,
            "n_layers": text.num_hidden_layers - len(text.cross_attention_layers),
            "n_heads": text.num_attention_heads,
            "n_kv_heads": text.num_key_value_heads,
            "vocab_size": VOCAB,
            "multiple_of": 1,
            "ffn_dim_multiplier": text.intermediate_size / int(8 * width / 3),
            "norm_eps": text.rms_norm_eps,
            "rope_theta": 500000.0,
            "use_scaled_rope": True,
            "max_seq_len": 32,
        },
        "crossed": len(text.cross_attention_layers),
        "image": IMAGE,
        "prompts": [
            {"tokens": tokens, "arrangements": [list(ARRANGEMENTS[index - 1]) for index in ids]}
            for tokens, ids in PROMPTS.values()
        ],
        "tile": TILE,
        "pictures": len(pictures()),
    }
    return {
        **weights,
        **{f"w:grid.{name}": grid.numpy() for name, grid in grids(model).items()},
        **{f"images:{index}": pixels(ids).numpy() for index, (_, ids) in enumerate(PROMPTS.values())},
        **{f"picture:{index}": picture for index, picture in enumerate(pictures())},
        "sizes": np.array(json.dumps(sizes)),
    }


def recorded_anew(interpreter: str, folder: Path) -> dict[str, npt.NDArray[Any]]:
    """What Meta's code computes now."""
    np.savez(folder / "given.npz", **given(theirs()))
    command = [interpreter, str(ORACLE), str(folder / "given.npz"), str(folder / "found.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    with np.load(folder / "found.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def model() -> Any:
    return theirs()


@pytest.fixture(scope="module")
def recorded() -> dict[str, npt.NDArray[Any]]:
    with np.load(RECORDED) as found:
        return dict(found)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_metas_code(name: str, model: Any, recorded: dict[str, npt.NDArray[Any]]) -> None:
    tokens, ids = PROMPTS[name]
    expected = recorded[f"logits:{list(PROMPTS).index(name)}"]
    found = our_logits(our_model(model), tokens, ids, pixels(ids)).numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    with corrected(model):
        np.testing.assert_allclose(their_logits(model, tokens, ids, pixels(ids)).numpy(), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kept", ["features", "rows"])
def test_transformers_as_it_is_differs_from_metas_code(kept: str, model: Any, recorded: dict[str, npt.NDArray[Any]]) -> None:
    """Each correction by itself is wanted: without it a prompt's logits are others. A release of transformers that mends one fails here."""
    name = "text first"
    tokens, ids = PROMPTS[name]
    expected = recorded[f"logits:{list(PROMPTS).index(name)}"]
    with corrected(model, features=kept != "features", rows=kept != "rows"):
        difference = np.abs(their_logits(model, tokens, ids, pixels(ids)).numpy() - expected).max()
    assert difference > 0.01, f"transformers no longer needs the correction of its {kept}"


def test_pixels_are_those_of_metas_transform(recorded: dict[str, npt.NDArray[Any]]) -> None:
    for picture, expected in zip(pictures(), recorded["tiles"].tolist(), strict=True):
        found = tiles_of(picture, TILE, ARRANGEMENTS, MEAN, STD)
        digest = hashlib.sha256(np.ascontiguousarray(found.pixels[: found.num_tiles]).tobytes()).hexdigest()
        assert f"{found.arrangement[0]}x{found.arrangement[1]} {digest}" == expected


@pytest.mark.slow
def test_the_record_is_what_metas_code_computes(tmp_path: Path, recorded: dict[str, npt.NDArray[Any]]) -> None:
    interpreter = os.environ.get("LLAMA_MODELS_PYTHON")
    if interpreter is None:
        pytest.skip("needs LLAMA_MODELS_PYTHON: an interpreter with llama-models (tests/families/meta_oracle.py)")
    found = recorded_anew(interpreter, tmp_path)
    assert found.keys() == recorded.keys()
    assert (found.pop("tiles") == recorded["tiles"]).all()
    for name, values in found.items():
        np.testing.assert_allclose(values, recorded[name], rtol=0, atol=1e-5)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        np.savez_compressed(RECORDED, **recorded_anew(sys.argv[1], Path(folder)))  # type: ignore[arg-type]
