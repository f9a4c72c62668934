"""Small random OpenFlamingo models: transformers' language models and CLIP, joined by the published equations of perceiver and gated block.

The equations are written here from the paper (Awadalla et al. 2023) and the shapes of its checkpoints, for whole uncached sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from flamingo_reference.checkpoints.families import language_models, openflamingo, openflamingo_files
from flamingo_reference.config import ModelConfig, TokenIds
from flamingo_reference.model import Flamingo

HEADS, HEAD_SIZE, IMAGE, END, VOCAB = 2, 64, 62, 61, 64
TOKENS = TokenIds(pad=63, bos=0, eoc=END, image=IMAGE)
SIDE, PATCH, MEDIA_WIDTH = 28, 7, 64  # one head of CLIP
LATENTS, DEPTH = 5, 2


def draw(module: Any, seed: int) -> Any:
    """Numbers for every parameter, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            norm = any(part in name for part in ("norm", "layrnorm"))
            if parameter.dim() == 1:
                parameter.copy_((1.0 if norm and name.endswith("weight") else 0.0) + 0.3 * drawn)
            elif name.endswith(("wte.weight", "embed_in.weight", "embed_tokens.weight", "position_embedding.weight")):
                parameter.copy_(drawn)
            else:
                parameter.copy_(drawn * 1.2 / parameter[0].numel() ** 0.5)
    return module.double().eval()


def llama() -> Any:
    """Grouped heads, as LLaMA 2 has."""
    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96,
        ),
        attn_implementation="eager",
    )  # fmt: skip


def neox(*, parallel: bool) -> Any:
    """Partial rotary positions, base other than the usual."""
    return GPTNeoXForCausalLM._from_config(
        GPTNeoXConfig(
            vocab_size=VOCAB + 6, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=3,
            max_position_embeddings=96, use_parallel_residual=parallel,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        ),
        attn_implementation="eager",
    )  # fmt: skip


def mpt(heads: int = 4) -> Any:
    """MPT-7B's kind."""
    return MptForCausalLM(MptConfig(vocab_size=VOCAB, d_model=48, n_heads=heads, n_layers=4, max_seq_len=96))


class Normed:
    """MPT-1B's norms of queries and keys, put into transformers' MPT, which has none, where it splits q, k and v."""

    def __init__(self, weight_q: Tensor, weight_k: Tensor) -> None:
        self.weights = weight_q, weight_k

    def __call__(self, module: Any, _: Any, qkv: Tensor) -> Tensor:
        parts = list(qkv.chunk(3, dim=-1))
        for place, weight in enumerate(self.weights):
            parts[place] = F.layer_norm(parts[place], weight.shape, weight.to(qkv), None, 1e-5)
        return torch.cat(parts, dim=-1)


LAYERS = {
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
    "mosaic_gpt": "transformer.blocks",
}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt_neox, sequential": lambda: neox(parallel=False),
    "gpt_neox, parallel": lambda: neox(parallel=True),
    "mpt": mpt,
    "mpt, 6 heads": lambda: mpt(6),
    "mosaic_gpt": mpt,
}


class Theirs:
    """A whole model, and its tensors in the three files as they are published."""

    def __init__(self, kind: str, *, every: int = 2, seed: int = 0) -> None:
        self.kind, self.every = kind.split(",")[0], every
        self.lm = draw(KINDS[kind](), seed)
        vision = CLIPVisionConfig(
            hidden_size=MEDIA_WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=SIDE,
            patch_size=PATCH,
        )
        self.clip = draw(CLIPVisionModel._from_config(vision, attn_implementation="eager"), seed + 1)
        self.width = self.lm.config.hidden_size
        generator = torch.Generator().manual_seed(seed + 2)
        self.tensors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale + centre
            for name, (shape, scale, centre) in self._bridge().items()
        }
        self.norms = torch.randn(4, 2, self.width, generator=generator, dtype=torch.float64) * 0.3 + 1.0
        if self.kind == "mosaic_gpt":
            for block, (q, k) in zip(self.lm.transformer.blocks, self.norms, strict=True):
                block.attn.Wqkv.register_forward_hook(Normed(q, k))
        self.gated = range(every - 1, 4, every)
        self.dtype = torch.float64

    def to(self, dtype: torch.dtype) -> Theirs:
        """The same model in another type."""
        self.lm, self.clip, self.dtype = self.lm.to(dtype), self.clip.to(dtype), dtype
        return self

    def _bridge(self) -> dict[str, tuple[tuple[int, ...], float, float]]:
        """name -> shape, scale, centre: facts of the published checkpoints."""
        inner, media, width = HEADS * HEAD_SIZE, MEDIA_WIDTH, self.width
        found: dict[str, tuple[tuple[int, ...], float, float]] = {"perceiver.latents": ((LATENTS, media), 1.0, 0.0)}

        def norm(name: str, size: int) -> None:
            found[f"{name}.weight"], found[f"{name}.bias"] = ((size,), 0.3, 1.0), ((size,), 0.3, 0.0)

        def matrix(name: str, out: int, into: int) -> None:
            found[f"{name}.weight"] = ((out, into), into**-0.5, 0.0)

        for i in range(DEPTH):
            at = f"perceiver.layers.{i}"
            norm(f"{at}.0.norm_media", media)
            norm(f"{at}.0.norm_latents", media)
            matrix(f"{at}.0.to_q", inner, media)
            matrix(f"{at}.0.to_kv", 2 * inner, media)
            matrix(f"{at}.0.to_out", media, inner)
            norm(f"{at}.1.0", media)
            matrix(f"{at}.1.1", 4 * media, media)
            matrix(f"{at}.1.3", media, 4 * media)
        norm("perceiver.norm", media)
        for i in range(self.every - 1, 4, self.every):
            at = f"lang_encoder.{LAYERS[self.kind]}.{i}.gated_cross_attn_layer"
            found[f"{at}.attn_gate"] = found[f"{at}.ff_gate"] = ((1,), 0.5, 0.3)
            norm(f"{at}.attn.norm", width)
            matrix(f"{at}.attn.to_q", inner, width)
            matrix(f"{at}.attn.to_kv", 2 * inner, media)
            matrix(f"{at}.attn.to_out", width, inner)
            norm(f"{at}.ff.0", width)
            matrix(f"{at}.ff.1", 4 * width, width)
            matrix(f"{at}.ff.3", width, 4 * width)
        return found

    # The equations.

    def _w(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._w(f"{name}.weight"), self._w(f"{name}.bias"))

    def _feed_forward(self, x: Tensor, name: str) -> Tensor:
        return F.gelu(self._norm(x, f"{name}.0") @ self._w(f"{name}.1.weight").T) @ self._w(f"{name}.3.weight").T

    def _attend(self, x: Tensor, context: Tensor, name: str, seen: Tensor | None = None) -> Tensor:
        """x [S, W] over context [L, W']; seen [S, L] leaves out the others, and rows that see nothing are zero."""
        q, kv = x @ self._w(f"{name}.to_q.weight").T, context @ self._w(f"{name}.to_kv.weight").T
        k, v = kv.chunk(2, dim=-1)
        heads = []
        for head in range(HEADS):
            part = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            scores = q[:, part] @ k[:, part].T / HEAD_SIZE**0.5
            if seen is not None:
                scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
            probs = scores.softmax(dim=-1)
            if seen is not None:
                probs = torch.where(seen.any(dim=-1, keepdim=True), probs, 0.0)
            heads.append(probs @ v[:, part])
        return torch.cat(heads, dim=-1) @ self._w(f"{name}.to_out.weight").T

    def latents(self, pixels: Tensor) -> Tensor:
        """[M, R, E] of images [M, 3, I, I]: CLIP's patch tokens before its last norm, through the perceiver."""
        features = self.clip(pixel_values=pixels).last_hidden_state[:, 1:]
        found = []
        for media in features:
            x = self._w("perceiver.latents")
            for i in range(DEPTH):
                at = f"perceiver.layers.{i}"
                normed = self._norm(x, f"{at}.0.norm_latents")
                context = torch.cat([self._norm(media, f"{at}.0.norm_media"), normed])
                x = x + self._attend(normed, context, f"{at}.0")
                x = x + self._feed_forward(x, f"{at}.1")
            found.append(self._norm(x, "perceiver.norm"))
        return torch.stack(found)

    def logits(self, tokens: list[int], pixels: Tensor) -> Tensor:
        """[S, V] of one request; images [M, 3, I, I]. Each token attends to the image last shown, its own tag's included."""
        with torch.no_grad():
            context = self.latents(pixels.to(self.dtype)).flatten(0, 1)
            ids = torch.tensor(tokens)
            text_time = (ids == IMAGE).cumsum(0)
            media_time = torch.arange(1, len(pixels) + 1).repeat_interleave(LATENTS)
            seen = text_time[:, None] == media_time

            def block(at: str) -> Callable[..., Any]:
                def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                    x = args[0][0]
                    normed = self._norm(x, f"{at}.attn.norm")
                    x = x + self._w(f"{at}.attn_gate").tanh() * self._attend(normed, context, f"{at}.attn", seen)
                    x = x + self._w(f"{at}.ff_gate").tanh() * self._feed_forward(x, f"{at}.ff")
                    return (x[None], *args[1:]), kwargs

                return before

            layers = self.lm.get_submodule(LAYERS[self.kind])
            handles = [
                layers[i].register_forward_pre_hook(
                    block(f"lang_encoder.{LAYERS[self.kind]}.{i}.gated_cross_attn_layer"), with_kwargs=True
                )
                for i in self.gated
            ]
            out = self.lm(input_ids=ids[None], use_cache=False).logits[0]
            for handle in handles:
                handle.remove()
        return out[:, :VOCAB]

    # The files.

    def language_model_config(self) -> dict[str, Any]:
        """config.json as published."""
        raw: dict[str, Any] = self.lm.config.to_dict()
        if self.kind != "mosaic_gpt":
            return raw
        kept = {name: raw[name] for name in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "no_bias")}
        return {
            **kept, "model_type": "mosaic_gpt", "mlp_ratio": 4, "alibi": True, "alibi_bias_max": 8, "attn_qk_ln": True,
            "attn_clip_qkv": None, "attn_impl": "torch", "attn_pdrop": 0, "softmax_scale": None, "logit_scale": None,
        }  # fmt: skip

    def language_model(self) -> dict[str, Any]:
        """Its tensors as published."""
        tensors = {name: tensor.double().numpy() for name, tensor in self.lm.state_dict().items()}
        if self.kind in ("mpt", "mosaic_gpt"):
            del tensors["lm_head.weight"]  # tied
        if self.kind == "gpt_neox":  # its name in every published file
            tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
        if self.kind == "mosaic_gpt":
            for old, new in (("norm_1", "ln_1"), ("norm_2", "ln_2"), ("ffn.up_proj", "mlp.mlp_up"), ("ffn.down_proj", "mlp.mlp_down"),
                             ("norm_f", "ln_f")):  # fmt: skip
                tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
            for i, (q, k) in enumerate(self.norms.numpy()):
                tensors[f"transformer.blocks.{i}.attn.q_ln.weight"] = q
                tensors[f"transformer.blocks.{i}.attn.k_ln.weight"] = k
        return tensors

    def checkpoint(self) -> dict[str, Any]:
        """checkpoint.pt: the bridge, and the embedding, which was trained: VOCAB rows of it."""
        found = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        embedding = language_models.family_of(self.language_model_config()).embedding
        found[f"lang_encoder.{embedding}.weight"] = self.lm.get_input_embeddings().weight.detach().double().numpy()[:VOCAB]
        return found

    def vision(self, layout: str) -> dict[str, Any]:
        """CLIP's file, by OpenAI's names or by transformers'."""
        tensors = {name: tensor.double().numpy() for name, tensor in self.clip.state_dict().items()}
        tensors = {
            name if name.startswith("vision_model.") else f"vision_model.{name}": tensor for name, tensor in tensors.items()
        }
        return tensors if layout == "transformers" else as_openai(tensors)


def as_openai(tensors: dict[str, Any]) -> dict[str, Any]:
    """CLIP's tensors by OpenAI's names, q, k and v joined, with some of the text encoder's beside them."""
    found: dict[str, Any] = {
        "logit_scale": np.zeros(()),
        "positional_embedding": np.zeros((77, 4)),
        "visual.proj": np.zeros((MEDIA_WIDTH, 4)),
    }
    renamed = (
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
        ("self_attn.out_proj", "attn.out_proj"),
    )  # fmt: skip
    for name, tensor in tensors.items():
        if "q_proj" in name:
            joined = np.concatenate([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            stem = name.replace("vision_model.encoder.layers", "visual.transformer.resblocks").split(".self_attn")[0]
            found[f"{stem}.attn.in_proj_{name.rsplit('.', 1)[1]}"] = joined
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in renamed:
                name = name.replace(old, new)
            found[name] = tensor
    return found


def files_of(tensors: dict[str, dict[str, Any]], raw: dict[str, Any]) -> openflamingo_files.Files:
    """Shapes of the three files."""
    shapes: dict[str, Any] = {
        file: {name: tuple(tensor.shape) for name, tensor in held.items()} for file, held in tensors.items()
    }
    return openflamingo_files.Files(**shapes, language_model_config=raw)


def ours(theirs: Theirs, *, layout: str = "openai") -> tuple[Flamingo, openflamingo_files.Files]:
    """Our model with their weights, through the family's names; and the files."""
    tensors = {"checkpoint": theirs.checkpoint(), "language_model": theirs.language_model(), "vision": theirs.vision(layout)}
    files = files_of(tensors, theirs.language_model_config())
    config: ModelConfig = openflamingo.config_from(files, tokens=TOKENS)
    joined = {name: tensor for held in tensors.values() for name, tensor in held.items()}
    state = {
        name: torch.from_numpy(np.array(recipe.make([joined[source] for source in recipe.sources])))
        for name, recipe in openflamingo.recipes(config, files).items()
    }
    model = Flamingo(config).double()
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False).eval(), files
