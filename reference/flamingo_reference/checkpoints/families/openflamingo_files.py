"""OpenFlamingo's and Otter's files: what names become in the plainest way of saving, and what lies where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from flamingo_reference.arrays import Shape
from flamingo_reference.checkpoints.families.language_models import Family, family_of

PLAIN = (
    (r"\.decoder_layer\.", r"."),
    (r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", r"lang_encoder.LAYERS.\1."),
    (r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.", r"lang_encoder.LAYERS.\1.gated_cross_attn_layer."),
    (r"\.gated_cross_attn_layer\.feed_forward\.", r".gated_cross_attn_layer.ff."),
    (r"^(perceiver\.layers\.\d+)\.(norm_media|norm_latents|to_q|to_kv|to_out)\.", r"\1.0.\2."),
    (r"^(perceiver\.layers\.\d+)\.feed_forward\.", r"\1.1."),
)
"""What names become in the plainest way of saving, by regular expressions, one after the other: layers below `decoder_layer` (v1 and v2),
second names of layers and gated blocks (v1), Otter's lists of feed-forwards. LAYERS stands for the language model's list of layers."""
_VISION = "vision_encoder."


def plain_name(name: str) -> str:
    """A tensor's name without what depends on how the model was put together: the `lang_encoder.` that OpenFlamingo puts the language model
    in, the `decoder_layer` that it puts each of its layers in; gated blocks as in a list of their own. GPT-NeoX's output, `embed_out` in files,
    is `lm_head` in memory since transformers 5."""
    for pattern, plain in PLAIN[:1] + PLAIN[3:]:
        name = re.sub(pattern, plain, name)
    name = re.sub(r"^embed_out\.", "lm_head.", name.removeprefix("lang_encoder."))
    return re.sub(r"^.*\.(\d+)\.gated_cross_attn_layer\.", r"gated_cross_attn_layers.\1.", name)


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes of the tensors in each of the three files, and the language model's config.json. absent: names of the language model's tensors
    whose files are not there. Where one file holds all (Otter), the others have no tensors."""

    checkpoint: Mapping[str, Shape]
    language_model: Mapping[str, Shape]
    vision: Mapping[str, Shape]
    language_model_config: Mapping[str, Any]
    absent: frozenset[str] = frozenset()

    @property
    def family(self) -> Family:
        """How the language model is read."""
        return family_of(self.language_model_config)

    def trained(self) -> dict[str, str]:
        """Names of checkpoint.pt by the name they would have in the plainest way of saving.

        That is perceiver., lang_encoder.LAYERS.i.gated_cross_attn_layer. and lang_encoder.NAME for tensors of the language model.
        """
        return {plain: names[0] for plain, names in self._by_plain_name().items()}

    def twins(self) -> dict[str, str]:
        """Second names of checkpoint.pt's tensors, each with the name in use (`trained`)."""
        return {other: names[0] for names in self._by_plain_name().values() for other in names[1:]}

    def _by_plain_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.checkpoint:
            plain = name
            for pattern, replacement in PLAIN:
                plain = re.sub(pattern, replacement.replace("LAYERS", self.family.layers), plain)
            found.setdefault(plain, []).append(name)
        return found

    def trained_vision(self) -> dict[str, str]:
        """CLIP's tensors in checkpoint.pt by the names that they would have in CLIP's own file: OpenFlamingo keeps open_clip's `visual`,
        Otter transformers' CLIPVisionModel."""
        inner = {name.removeprefix(_VISION): name for name in self.checkpoint if name.startswith(_VISION)}
        if any(name.startswith(("visual.", "vision_model.", "embeddings.", "encoder.")) for name in inner):
            return inner
        return {f"visual.{name}": actual for name, actual in inner.items()}


def otter_text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """text_config of Otter's config.json, whose model_type is left out or that of an own class in some: `architectures` tells then."""
    named = raw.get("architectures")
    found = {"MPTForCausalLM": "mpt", "MosaicGPT": "mosaic_gpt", "LlamaForCausalLM": "llama"}
    by_class = [found[name] for name in named if isinstance(name, str) and name in found] if isinstance(named, list) else []
    return {**raw, "model_type": by_class[0]} if by_class else raw
