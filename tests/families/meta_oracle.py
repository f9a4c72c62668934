"""Meta's own code of Llama 3.2 Vision (package llama-models) on the weights and prompts of a file, for `test_meta_reference.py`.

It runs in an environment of its own, which has torch, numpy, Pillow and, without what they want besides, llama-models, fairscale,
torchvision and tiktoken:

    python -m venv meta && meta/bin/python -m pip install torch numpy pillow pydantic regex requests jinja2
    meta/bin/python -m pip install --no-deps llama-models==0.3.0 fairscale torchvision tiktoken
    meta/bin/python tests/families/meta_oracle.py GIVEN.npz FOUND.npz

Nothing of this project is imported here.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import numpy as np
import torch


def main(given: str, found: str) -> None:
    """Reads weights by transformers' names, sizes, prompts and images; writes logits of each prompt [S, V], and digests of tiles."""
    for name in ("nms", "qnms"):  # torchvision's own library may be of another build than torch; none of its operators is used
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo")
    theirs("fairscale.nn.model_parallel.initialize").initialize_model_parallel(1)
    torch.set_default_dtype(torch.float64)
    data = np.load(given)
    sizes = json.loads(str(data["sizes"]))
    weights = {name.removeprefix("w:"): torch.from_numpy(data[name]) for name in data.files if name.startswith("w:")}
    vision, text = models(sizes, weights)
    results: dict[str, np.ndarray[Any, Any]] = {}
    with torch.no_grad():
        for index, prompt in enumerate(sizes["prompts"]):
            images = torch.from_numpy(data[f"images:{index}"])
            results[f"logits:{index}"] = logits(vision, text, sizes, prompt["tokens"], images, prompt["arrangements"]).numpy()
    results["tiles"] = np.array(tiles(sizes["tile"], [data[f"picture:{index}"] for index in range(sizes["pictures"])]))
    np.savez_compressed(found, **results)  # type: ignore[arg-type]


def theirs(module: str) -> Any:
    """A module of Meta's code. (Type checkers know another `llama_models`, this folder's neighbour.)"""
    return importlib.import_module(module)


def models(sizes: dict[str, Any], weights: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Vision transformer with projection, and text model, of the sizes given."""
    code = theirs("llama_models.llama3.multimodal.model")
    vision: Any = torch.nn.Module()
    vision.encoder = code.VisionEncoder(**sizes["vision"])
    vision.projection = code.ColumnParallelLinear(sizes["features"], sizes["text"]["dim"], bias=True, init_method=lambda x: x)
    load(vision.encoder, vision_weights(weights, sizes))
    load(vision.projection, {"weight": weights["projector.weight"], "bias": weights["projector.bias"]})
    adapter = {"cross_attention_adapter": {"num_layers": sizes["crossed"]}}
    args = theirs("llama_models.llama3.args").ModelArgs(**sizes["text"], vision_model=adapter)
    text = code.CrossAttentionTransformerText(args)
    load(text, text_weights(weights, sizes))
    text.setup_cache(1, torch.device("cpu"), torch.float64)
    return vision, text


def load(module: Any, state: dict[str, torch.Tensor]) -> None:
    """Without Meta's hooks, which resize embeddings that have their size already."""
    own = {**dict(module.named_parameters())}
    if own.keys() != state.keys():
        raise SystemExit(f"names differ: {sorted(own.keys() ^ state.keys())}")
    for name, parameter in own.items():
        parameter.data = state[name].reshape(parameter.shape).double()


def vision_weights(w: dict[str, torch.Tensor], sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Meta's names of the vision transformer's weights. Grids of tiles are given as such."""
    state = {
        "class_embedding": w["vision.class_embedding"],
        "conv1._linear.weight": w["vision.patch_embedding.weight"],
        "positional_embedding": w["vision.gated_positional_embedding.embedding"],
        "gated_positional_embedding": w["grid.position"],
        "gated_positional_embedding_gate": w["vision.gated_positional_embedding.gate"],
        "pre_tile_pos_embed.embedding": w["grid.pre"],
        "pre_tile_pos_embed.gate": w["vision.pre_tile_positional_embedding.gate"],
        "post_tile_pos_embed.embedding": w["grid.post"],
        "post_tile_pos_embed.gate": w["vision.post_tile_positional_embedding.gate"],
    }
    for own, named in (("ln_pre", "layernorm_pre"), ("ln_post", "layernorm_post")):
        state |= {f"{own}.{part}": w[f"vision.{named}.{part}"] for part in ("weight", "bias")}
    names = {
        "attn.wq.weight": "self_attn.q_proj.weight",
        "attn.wk.weight": "self_attn.k_proj.weight",
        "attn.wv.weight": "self_attn.v_proj.weight",
        "attn.wo.weight": "self_attn.o_proj.weight",
        "ln_1.weight": "input_layernorm.weight",
        "ln_1.bias": "input_layernorm.bias",
        "ln_2.weight": "post_attention_layernorm.weight",
        "ln_2.bias": "post_attention_layernorm.bias",
        "mlp.c_fc.weight": "mlp.fc1.weight",
        "mlp.c_fc.bias": "mlp.fc1.bias",
        "mlp.c_proj.weight": "mlp.fc2.weight",
        "mlp.c_proj.bias": "mlp.fc2.bias",
    }
    gates = {"gate_attn": "gate_attn", "gate_ffn": "gate_ffn"}
    parts: tuple[tuple[str, str, dict[str, str]], ...] = (
        ("transformer", "layers", {}),
        ("global_transformer", "n_global_layers", gates),
    )
    for part, count, extra in parts:
        for layer in range(sizes["vision"][count]):
            own, named = f"{part}.resblocks.{layer}.", f"vision.{part}.layers.{layer}."
            state |= {own + meta: w[named + other] for meta, other in {**names, **extra}.items()}
    return state


def text_weights(w: dict[str, torch.Tensor], sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Meta's names of the text model's weights. Its rotary positions pair neighbouring channels, transformers' the halves of a head."""
    rows, heads = sizes["text"]["vocab_size"], sizes["text"]["n_heads"]

    def paired(weight: torch.Tensor, count: int) -> torch.Tensor:
        return weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    embedding = w["text.embed_tokens.weight"]
    state = {
        "tok_embeddings.weight": embedding[:rows],
        "learnable_embedding.weight": embedding[rows:],
        "norm.weight": w["text.norm.weight"],
        "output.weight": w["head.weight"],
    }
    feed_forward = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    plain = crossed = 0
    for layer in range(sizes["text"]["n_layers"] + sizes["crossed"]):
        named = f"text.layers.{layer}."
        if named + "cross_attn.q_proj.weight" in w:
            own, attention = f"cross_attention_layers.{crossed}.", "cross_attn."
            crossed += 1
            state[own + "gate_attn"] = w[named + "cross_attn_attn_gate"]
            state[own + "gate_ffwd"] = w[named + "cross_attn_mlp_gate"]
            state |= {f"{own}attention.{norm}.weight": w[f"{named}cross_attn.{norm}.weight"] for norm in ("q_norm", "k_norm")}
        else:
            own, attention = f"layers.{plain}.", "self_attn."
            plain += 1
        for part in "qkvo":
            weight = w[f"{named}{attention}{part}_proj.weight"]
            if attention == "self_attn." and part in "qk":
                weight = paired(weight, heads if part == "q" else sizes["text"]["n_kv_heads"])
            state[f"{own}attention.w{part}.weight"] = weight
        state[own + "attention_norm.weight"] = w[named + "input_layernorm.weight"]
        state[own + "ffn_norm.weight"] = w[named + "post_attention_layernorm.weight"]
        state |= {f"{own}feed_forward.{a}.weight": w[f"{named}mlp.{b}.weight"] for a, b in feed_forward.items()}
    return state


def logits(
    vision: Any, text: Any, sizes: dict[str, Any], tokens: list[int], images: torch.Tensor, arrangements: list[list[int]]
) -> torch.Tensor:
    """Of a prompt [S, V]; images [N, Tmax, 3, I, I], arrangements (rows, columns) of each."""
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens))
    hidden = text.get_partially_trainable_embedding(ids)
    masks = row_mask = None
    caches: Any = [None] * sizes["crossed"]
    if arrangements:
        features = vision.encoder(images[None], torch.tensor(arrangements)[None])
        seen = torch.nn.functional.linear(features, vision.projection.weight, vision.projection.bias)
        caches = [layer.compute_xattn_kv_cache(seen.flatten(1, 3)) for layer in text.cross_attention_layers]
        padded = theirs("llama_models.llama3.multimodal.model")._pad_masks(
            [theirs("llama_models.llama3.chat_format").create_vision_mask(tokens, sizes["image"])],
            [[rows * columns for rows, columns in arrangements]],
            len(tokens),
            images.shape[1],
        )
        masks, row_mask = text._get_xattn_mask(
            num_tokens=len(tokens),
            text_device="cpu",
            text_dtype=torch.float64,
            vision_tokens=seen,
            cross_attention_masks=padded,
        )
    found: torch.Tensor = text(positions, hidden, masks, row_mask, caches, text_only_inference=not arrangements)
    return found[0]


def tiles(side: int, pictures: list[np.ndarray[Any, Any]]) -> list[str]:
    """SHA-256 of the tiles that Meta's transform makes of each picture, float32, and its arrangement."""
    import hashlib

    from PIL import Image

    torch.set_default_dtype(torch.float32)
    transform = theirs("llama_models.llama3.multimodal.image_transform").VariableSizeImageTransform(size=side)
    found = []
    for picture in pictures:
        made, (rows, columns) = transform(Image.fromarray(picture), max_num_chunks=4)
        digest = hashlib.sha256(np.ascontiguousarray(made.numpy(), np.float32).tobytes()).hexdigest()
        found.append(f"{rows}x{columns} {digest}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
