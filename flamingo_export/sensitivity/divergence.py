"""How far the logits of the whole model move when one layer is quantised."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_calibration.samples import Checked, Ready
from flamingo_export import estimates
from flamingo_export.machine import available_memory
from flamingo_export.precision import Precision
from flamingo_export.progress import Progress
from flamingo_export.runtime.media import Medium, load_medium
from flamingo_export.sensitivity.quantised_copies import QuantisedCopies
from flamingo_export.sources import WeightSource
from flamingo_export.specs import IMAGE_TOWER, TEXT_TOWER
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = ("vision_encoder", "resampler")
"""Layers before the language model: latents change only with them."""
OF_CONTRASTIVE = {
    "contrastive.readout": "vision_encoder/readout",
    "contrastive.image": IMAGE_TOWER,
    "contrastive.text": TEXT_TOWER,
}
"""What the parts of a contrastive encoder are called in a bundle. The language model does not read them."""


def no_room(config: ModelConfig, precision: Precision, memory: int | None) -> str:
    """Why the whole model is not run in `memory` bytes (None: what the machine has free); empty if it is."""
    budget = available_memory() if memory is None else memory
    return estimates.shortage(
        "the whole model beside its quantised copies", estimates.quantised_copies(config, precision), budget
    )


def divergences(
    source: WeightSource, checked: Checked, copies: QuantisedCopies, layers: Mapping[str, Set[str]], progress: Progress
) -> tuple[float, dict[str, float]]:
    """Kullback-Leibler divergence of the quantised model's next-token distribution from the reference's, in nats, mean over all positions.

    layers: what is quantised of each, by its name. Returns it with everything quantised, and with each layer by itself: 0 for the towers of a
    contrastive encoder, which no logit depends on.
    """
    import torch

    model = _whole(source)
    everything = frozenset().union(*layers.values())
    models = {name: copies.of(model, "", names) for name, names in layers.items() if name not in OF_CONTRASTIVE.values()}
    changed = copies.of(model, "", everything)
    encoded = {name for name in layers if name in ENCODERS}
    progress.stage("logits", len(checked.samples))
    sums = dict.fromkeys(layers, 0.0)
    total = 0.0
    with torch.no_grad():
        for sample in checked.samples:
            media = [load_medium(medium, source.config, source.inputs.fit) for medium in sample.media]
            latents = _latents(model, media)
            expected = _log_probabilities(model, sample, latents)
            for name, copy in models.items():
                seen = _latents(copy, media) if name in encoded else latents
                sums[name] += _divergence(expected, _log_probabilities(copy, sample, seen))
            seen = _latents(changed, media) if encoded else latents
            total += _divergence(expected, _log_probabilities(changed, sample, seen))
            progress.advance(1)
    return total / checked.num_tokens, {name: found / checked.num_tokens for name, found in sums.items()}


def _whole(source: WeightSource) -> Any:
    import torch

    from flamingo_reference.model import Flamingo, torch_from_numpy

    with torch.device("meta"):
        model = Flamingo(source.config)
    state = {name: torch_from_numpy(source.read(name)).float() for name in source.names()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _latents(model: Any, media: list[Medium]) -> Tensor:
    """Latents [N, R, W] of a sample's media, a row a tile where these are images of tiles."""
    import torch

    resampler = model.config.resampler
    none = torch.zeros(0, resampler.num_latents, resampler.width)
    rows = [none]
    for medium in media:
        pixels = torch.from_numpy(medium.pixels)
        rows.append(model.latents(pixels, torch.tensor([medium.aspect])) if medium.aspect else model.latents(pixels[None]))
    return torch.cat(rows)


def _log_probabilities(model: Any, sample: Ready, latents: Tensor) -> Tensor:
    """[S, V] in fp64."""
    import torch

    rows = torch.arange(len(latents))[None]
    ids, phi = torch.from_numpy(np.asarray(sample.token_ids))[None], torch.from_numpy(sample.phi)[None]
    first = None if sample.first is None else torch.from_numpy(sample.first)[None]
    logits: Tensor = model(ids, model.media_kv(latents), rows, phi, first)[0]
    return logits.double().log_softmax(-1)


def _divergence(expected: Tensor, actual: Tensor) -> float:
    """Summed over positions; rounding may leave less than nothing."""
    return max(0.0, float((expected.exp() * (expected - actual)).sum()))
