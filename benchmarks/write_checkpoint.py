"""Writes a checkpoint of random weights in a published layout and size, to build, measure and test with where the real one is not at hand.

    python benchmarks/write_checkpoint.py idefics-9b --out idefics-9b/                 # 18 GB: bf16 safetensors in shards, index, config.json
    python benchmarks/write_checkpoint.py idefics-80b-index --out idefics-80b/     # only config.json and the index, for build --plan
    python benchmarks/write_checkpoint.py llama-3.2-11b-vision --out Llama-3.2-11B-Vision-Instruct/   # 21 GB: bf16 shards, chat template
    python benchmarks/write_checkpoint.py openflamingo-9b --out OpenFlamingo-9B/       # checkpoint.pt (fp32), mpt/ (bf16), clip/ (fp32)

Names and shapes are those of transformers' classes, made on the meta device, and for OpenFlamingo's bridge those of its public code. Numbers are
drawn tensor by tensor: memory is that of one tensor. `-tiny` models have the same layout in a few megabytes.

Needs PyTorch and transformers: run it with the Python of `make test` (.venv/bin/python), or of `pip install '.[transformers]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_NEEDS = "PyTorch and transformers are needed: run this with the Python of `make test`, or after pip install '.[transformers]'"
try:
    import ml_dtypes
    import numpy as np

    from flamingo_export.sources.random_weights import draw
    from flamingo_reference.checkpoints.files.torch_file import open_torch_file
    from flamingo_reference.checkpoints.files.writer import INDEX, writing
except ModuleNotFoundError as error:
    raise SystemExit(f"write_checkpoint.py: there is no {error.name}. flamingo-export, {_NEEDS}") from None

Shapes = Mapping[str, tuple[int, ...]]
SHARD_BYTES = 9_900_000_000
BF16 = np.dtype(ml_dtypes.bfloat16)

IDEFICS_9B = {
    "vocab_size": 32000,
    "additional_vocab_size": 2,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "cross_layer_interval": 4,
    "qk_layer_norms": True,
    "use_resampler": True,
    "max_position_embeddings": 2048,
    "alpha_initializer": "zeros",
    "alpha_type": "float",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vision_config": {
        "embed_dim": 1280,
        "image_size": 224,
        "patch_size": 14,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
    },
    "perceiver_config": {
        "use_resampler": True,
        "resampler_n_latents": 64,
        "resampler_depth": 6,
        "resampler_n_heads": 16,
        "resampler_head_dim": 96,
        "qk_layer_norms_perceiver": True,
    },
}
IDEFICS_80B = IDEFICS_9B | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
IDEFICS_TINY = IDEFICS_9B | {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "cross_layer_interval": 2,
    "max_position_embeddings": 128,
    "vision_config": {
        "embed_dim": 32,
        "image_size": 28,
        "patch_size": 14,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "perceiver_config": IDEFICS_9B["perceiver_config"]  # type: ignore[operator]
    | {"resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8},
}
MPT_7B = {
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": 50432,
    "no_bias": True,
}
MPT_TOKENS = 50277
"""Of MPT's tokenizer (GPT-NeoX-20B's): the language model's embedding has rows to spare, which OpenFlamingo's does not."""
MPT_TINY = MPT_7B | {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 128, "vocab_size": 320}
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
CLIP_TINY = CLIP_L | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
_LLAMA_TEXT = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "pad_token_id": 128004,
    "tie_word_embeddings": False,
}
_LLAMA_VISION = {
    "hidden_size": 1280,
    "image_size": 560,
    "patch_size": 14,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "vision_output_dim": 7680,
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
}
LLAMA_11B = {"image_token_index": 128256, "text_config": _LLAMA_TEXT, "vision_config": _LLAMA_VISION}
LLAMA_TINY = {
    "image_token_index": 300,
    "text_config": _LLAMA_TEXT
    | {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "cross_attention_layers": [1, 4],
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 3],
        "pad_token_id": 4,
    },
    "vision_config": _LLAMA_VISION
    | {
        "hidden_size": 32,
        "image_size": 28,
        "patch_size": 7,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_global_layers": 2,
        "attention_heads": 2,
        "intermediate_layers_indices": [1, 3],
        "vision_output_dim": 96,
    },
}
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Of the same turns as the published one, without tools and dates."""
ADDED_TOKENS = 3
"""`<|endofchunk|>`, `<image>` and `<PAD>`, behind the tokenizer's own."""


def meta_shapes(build: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a torch module would save, without making a number of it."""
    import torch

    with torch.device("meta"):
        module = build()
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def bridge_shapes(
    *, width: int, layers: int, every: int, vision: int, vocab: int, latents: int, depth: int
) -> dict[str, tuple[int, ...]]:
    """OpenFlamingo's own tensors for an MPT: resampler, gated blocks, the embedding with the added tokens. 8 heads of 64 in both."""
    inner, norms = 512, ("weight", "bias")
    shapes: dict[str, tuple[int, ...]] = {"perceiver.latents": (latents, vision)}
    for i in range(depth):
        attention, ffw = f"perceiver.layers.{i}.0", f"perceiver.layers.{i}.1"
        shapes |= {f"{attention}.{norm}.{part}": (vision,) for norm in ("norm_media", "norm_latents") for part in norms}
        shapes |= {f"{attention}.to_q.weight": (inner, vision), f"{attention}.to_kv.weight": (2 * inner, vision)}
        shapes |= {f"{attention}.to_out.weight": (vision, inner)} | {f"{ffw}.0.{part}": (vision,) for part in norms}
        shapes |= {f"{ffw}.1.weight": (4 * vision, vision), f"{ffw}.3.weight": (vision, 4 * vision)}
    shapes |= {f"perceiver.norm.{part}": (vision,) for part in norms}
    for layer in range(every - 1, layers, every):
        block = f"lang_encoder.transformer.blocks.{layer}.gated_cross_attn_layer"
        shapes |= {f"{block}.attn_gate": (1,), f"{block}.ff_gate": (1,)}
        shapes |= {f"{block}.attn.norm.{part}": (width,) for part in norms}
        shapes |= {f"{block}.attn.to_q.weight": (inner, width), f"{block}.attn.to_kv.weight": (2 * inner, vision)}
        shapes |= {f"{block}.attn.to_out.weight": (width, inner)} | {f"{block}.ff.0.{part}": (width,) for part in norms}
        shapes |= {f"{block}.ff.1.weight": (4 * width, width), f"{block}.ff.3.weight": (width, 4 * width)}
    return shapes | {"lang_encoder.transformer.wte.weight": (vocab, width)}


_LLAMA_GATES = ("cross_attn_attn_gate", "cross_attn_mlp_gate", "gate_attn", "gate_ffn", "gate")


def drawn(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Numbers that keep activations sane: norms about 1, gates 0.5, matrices by their fan-in. Each tensor has a seed of its own."""
    seed = [*hashlib.sha256(name.encode()).digest()]
    last = name.rsplit(".", 1)[-1]
    if last in ("attn_gate", "ff_gate", "alpha_cross_attn", "alpha_dense", *_LLAMA_GATES):
        return np.full(shape, 0.5, dtype)
    deviation = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    values = draw(seed, math.prod(shape), 0.5 if "embed" in name or "latents" in name or "wte" in name else deviation)
    if len(shape) == 1 and last == "weight":
        values += np.float32(1.0)
    return values.astype(dtype).reshape(shape)


def write_safetensors(folder: Path, shapes: Shapes, dtype: np.dtype[Any], *, shard_bytes: int = SHARD_BYTES) -> None:
    """`model.safetensors`, or shards with an index."""
    with writing(folder, shapes, max_file_bytes=shard_bytes) as writer:
        for name, shape in shapes.items():
            writer.add(name, drawn(name, shape, dtype))


def write_torch(path: Path, shapes: Shapes, dtype: np.dtype[Any]) -> None:
    """A `.pt` file as torch.save writes it: first with room for the numbers, which are then put where they belong, one tensor at a time."""
    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    # Never written to, so none of it takes memory.
    content = {name: torch.empty(shape, dtype=kinds[dtype.name]) for name, shape in shapes.items()}
    with torch.serialization.skip_data():
        torch.save({"model_state_dict": {f"module.{name}": tensor for name, tensor in content.items()}}, path)
    del content
    for name, entry in open_torch_file(path).items():
        place = np.memmap(path, mode="r+", dtype=np.uint8, offset=entry.start, shape=(entry.size,))
        place[:] = drawn(name, entry.shape, dtype).reshape(-1).view(np.uint8)
        place.flush()


def write_idefics(folder: Path, settings: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES) -> None:
    """IDEFICS v1 as it is published: bf16 shards, index, config.json, and a tokenizer of as many words."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(**settings)
    shapes = meta_shapes(lambda: IdeficsForVisionText2Text(config))
    write_config(folder, config)
    write_safetensors(folder, shapes, BF16, shard_bytes=shard_bytes)
    write_tokenizer(folder, *idefics_words(config.vocab_size))


def idefics_words(vocabulary: int) -> tuple[list[str], list[str]]:
    """Words of a tokenizer by id, and those among them that IDEFICS adds or that have a meaning."""
    first, added = ["<unk>", "<s>", "</s>"], ["<fake_token_around_image>", "<image>"]
    return [*first, *(f"w{index}" for index in range(len(first), vocabulary)), *added], [*first, *added]


def write_llama(folder: Path, settings: Mapping[str, Any], *, shard_bytes: int = 4_900_000_000) -> None:
    """Llama 3.2 Vision tuned on instructions as it is published: bf16 shards by their published names, index, config.json, the processor's
    settings, generation_config.json, a chat template and a tokenizer of as many tokens."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    from flamingo_reference.checkpoints.families.llama_vision import plain_name

    config = MllamaConfig(**settings)
    shapes = {plain_name(name): shape for name, shape in meta_shapes(lambda: MllamaForConditionalGeneration(config)).items()}
    write_config(folder, config)
    text, vision = settings["text_config"], settings["vision_config"]
    write_safetensors(folder, shapes, BF16, shard_bytes=shard_bytes)
    processor = {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": vision["max_num_tiles"],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": vision["image_size"], "width": vision["image_size"]},
    }
    generation = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("preprocessor_config.json", processor), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=1))
    (folder / "chat_template.jinja").write_text(LLAMA_TEMPLATE)
    words, special = llama_words(settings)
    write_tokenizer(folder, words, special)


def llama_words(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Words of a tokenizer by id, and those among them that carry structure."""
    text = settings["text_config"]
    end, message, turn = text["eos_token_id"]
    special = {
        text["bos_token_id"]: "<|begin_of_text|>",
        end: "<|end_of_text|>",
        message: "<|eom_id|>",
        turn: "<|eot_id|>",
        text["pad_token_id"]: "<|finetune_right_pad_id|>",
        turn - 2 if turn > 100 else 5: "<|end_header_id|>",
        turn - 3 if turn > 100 else 6: "<|start_header_id|>",
        settings["image_token_index"]: "<|image|>",
    }
    words = [special.get(index, f"w{index}") for index in range(settings["image_token_index"] + 1)]
    return words, list(special.values())


def write_index(folder: Path, settings: Mapping[str, Any]) -> None:
    """config.json and the index of an IDEFICS v1, without the shards that it names: what `build --plan` and `inspect` do with."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(**settings)
    shapes = meta_shapes(lambda: IdeficsForVisionText2Text(config))
    write_config(folder, config)
    sizes = {name: math.prod(shape) * BF16.itemsize for name, shape in shapes.items()}
    shard_of, shard, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > SHARD_BYTES:
            shard, filled = shard + 1, 0
        shard_of[name], filled = shard, filled + size
    files = {name: f"model-{number:05d}-of-{shard:05d}.safetensors" for name, number in shard_of.items()}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def write_openflamingo(folder: Path, mpt: Mapping[str, Any], clip: Mapping[str, Any], *, every: int, tokens: int) -> None:
    """OpenFlamingo v2 with an MPT: checkpoint.pt as training saved it, and beside it the language model (with a tokenizer of made-up words,
    as many as `tokens`) and CLIP that it leaves out."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, MptConfig, MptForCausalLM

    lm_config, clip_config = MptConfig(**mpt), CLIPVisionConfig(**clip)
    lm, vision = folder / "mpt", folder / "clip"
    write_config(lm, lm_config)
    lm_shapes = meta_shapes(lambda: MptForCausalLM(lm_config))
    lm_shapes.pop("lm_head.weight", None)  # tied to the embedding: files do not hold it
    write_safetensors(lm, lm_shapes, BF16)
    write_tokenizer(lm, ["<|endoftext|>", *(f"w{index}" for index in range(1, tokens))])
    write_config(vision, clip_config)
    # The prefix of the published files, which this version of transformers leaves out.
    inner = {
        name.removeprefix("vision_model."): shape for name, shape in meta_shapes(lambda: CLIPVisionModel(clip_config)).items()
    }
    write_safetensors(vision, {f"vision_model.{name}": shape for name, shape in inner.items()}, np.dtype(np.float32))
    bridge = bridge_shapes(
        width=mpt["d_model"],
        layers=mpt["n_layers"],
        every=every,
        vision=clip["hidden_size"],
        vocab=tokens + ADDED_TOKENS,
        latents=64,
        depth=6,
    )
    write_torch(folder / "checkpoint.pt", bridge, np.dtype(np.float32))


def write_tokenizer(folder: Path, words: Sequence[str], special: Sequence[str] = ()) -> None:
    """tokenizer.json of words parted by spaces; `special` are added tokens of the ids that they have among the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_config(folder: Path, config: Any) -> None:
    """config.json as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1))


MODELS: Mapping[str, Callable[[Path], None]] = {
    "llama-3.2-11b-vision": lambda folder: write_llama(folder, LLAMA_11B),
    "llama-3.2-vision-tiny": lambda folder: write_llama(folder, LLAMA_TINY, shard_bytes=400_000),
    "idefics-9b": lambda folder: write_idefics(folder, IDEFICS_9B),
    "idefics-80b-index": lambda folder: write_index(folder, IDEFICS_80B),
    "idefics-tiny": lambda folder: write_idefics(folder, IDEFICS_TINY, shard_bytes=150_000),
    "openflamingo-9b": lambda folder: write_openflamingo(folder, MPT_7B, CLIP_L, every=4, tokens=MPT_TOKENS),
    "openflamingo-tiny": lambda folder: write_openflamingo(folder, MPT_TINY, CLIP_TINY, every=2, tokens=300),
}


@contextlib.contextmanager
def told(what: str, folder: Path) -> Iterator[None]:
    """Says how long it took and what lies there."""
    import resource

    started = time.perf_counter()
    yield
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{what}: {size / 1e9:.2f} GB in {folder}, {time.perf_counter() - started:.0f} s, peak memory {peak / (1 << 30):.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    options = parser.parse_args()
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        parser.exit(1, f"write_checkpoint.py: there is no {' and no '.join(missing)}. {_NEEDS}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    with told(options.model, options.out):
        MODELS[options.model](options.out)


if __name__ == "__main__":
    main()
