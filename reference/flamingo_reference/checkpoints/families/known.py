"""The families of checkpoints that are known, as data: by what their files are recognised, and which other files they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from flamingo_reference.checkpoints.converted import Components, Converted
from flamingo_reference.checkpoints.families.convert import (
    convert_idefics,
    convert_llama_vision,
    convert_native,
    convert_openflamingo,
    convert_otter,
)
from flamingo_reference.checkpoints.families.llama_vision import plain_name as plain_llama_name
from flamingo_reference.checkpoints.families.openflamingo_files import plain_name
from flamingo_reference.input_format import IDEFICS, LLAMA_VISION, OPENFLAMINGO, OTTER, PAPER, InputFormat

Component = Literal["model", "language_model", "vision_encoder"]


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of checkpoint.

    component: what of a model it holds. model_types: values of model_type in config.json that say so; settings: keys of config.json that say so
    where there is no model_type. marks: regular expressions, each of which matches the whole name of one of its tensors at least.
    needs: the components that it leaves to other files.
    inputs: how it takes images and text. convert: makes the model of its files, None where it is but a component of one. plain_name: a tensor's
    name without what depends on how the model was put together, by which adapters find the tensors that they were trained on.
    advice: of a component that no family takes from another file, what to bring in its place.
    """

    name: str
    title: str
    component: Component = "model"
    model_types: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    marks: tuple[str, ...]
    needs: tuple[Component, ...] = ()
    inputs: InputFormat = PAPER
    convert: Callable[[Components], Converted] | None = None
    plain_name: Callable[[str], str] = str
    advice: str = ""


FAMILIES: tuple[Family, ...] = (
    Family(
        name="native",
        title="flamingo-export's own format",
        settings=("vision", "resampler", "cross_attention", "language_model"),
        marks=(r"resampler\.latents", r"language_model\.embedding\.weight", r"cross_attention\.\d+\..+"),
        convert=convert_native,
    ),
    Family(
        name="idefics",
        title="IDEFICS v1",
        model_types=("idefics",),
        inputs=IDEFICS,
        marks=(r"model\.gated_cross_attn_layers\.\d+\..+", r"model\.embed_tokens\.weight"),
        convert=convert_idefics,
    ),
    Family(
        name="llama_vision",
        title="Llama 3.2 Vision",
        model_types=("mllama",),
        inputs=LLAMA_VISION,
        marks=(
            r"(?:language_model\.model|model\.language_model)\.layers\.\d+\.cross_attn\..+",
            r"(?:model\.)?vision_model\.gated_positional_embedding\..+",
            r"(?:model\.)?multi_modal_projector\.weight",
        ),
        convert=convert_llama_vision,
        plain_name=plain_llama_name,
    ),
    Family(
        name="llama_vision_text",
        title="the language model of Llama 3.2 Vision without its vision encoder",
        component="language_model",
        advice="Bring the whole checkpoint, whose config.json says model_type 'mllama' and has a vision_config.",
        model_types=("mllama_text_model",),
        marks=(r"model\.layers\.\d+\.cross_attn\..+",),
    ),
    Family(
        name="otter",
        title="Otter",
        model_types=("otter",),
        inputs=OTTER,
        marks=(r"lang_encoder\..*gated_cross_attn_layer\.feed_forward\..+", r"perceiver\.latents", r"vision_encoder\..+"),
        convert=convert_otter,
        plain_name=plain_name,
    ),
    Family(
        name="openflamingo_folder",
        title="OpenFlamingo as Otter's authors converted it",
        model_types=("flamingo",),
        inputs=OPENFLAMINGO,
        marks=(r"lang_encoder\..*gated_cross_attn_layer\.feed_forward\..+", r"perceiver\.latents", r"vision_encoder\..+"),
        convert=convert_otter,
        plain_name=plain_name,
    ),
    Family(
        name="openflamingo",
        title="OpenFlamingo",
        marks=(r"lang_encoder\..*gated_cross_attn_layers?\..+", r"perceiver\.latents"),
        needs=("language_model", "vision_encoder"),
        inputs=OPENFLAMINGO,
        convert=convert_openflamingo,
        plain_name=plain_name,
    ),
    Family(
        name="llama",
        title="a LLaMA language model",
        component="language_model",
        model_types=("llama",),
        marks=(r"model\.layers\.\d+\.self_attn\.q_proj\.weight", r"model\.embed_tokens\.weight"),
    ),
    Family(
        name="gpt_neox",
        title="a GPT-NeoX language model",
        component="language_model",
        model_types=("gpt_neox",),
        marks=(r"gpt_neox\.layers\.\d+\..+",),
    ),
    Family(
        name="mpt",
        title="an MPT language model",
        component="language_model",
        model_types=("mpt", "mosaic_gpt"),
        marks=(r"transformer\.blocks\.\d+\..+",),
    ),
    Family(
        name="clip",
        title="a CLIP vision encoder",
        component="vision_encoder",
        model_types=("clip", "clip_vision_model"),
        marks=(r"(?:visual\.|(?:vision_model\.)?embeddings\.)class_embedding",),
    ),
)
"""More telling ones first: an IDEFICS checkpoint has all that a LLaMA's has."""
