"""preprocessor_config.json beside a model: how its images were prepared in training, where transformers writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from flamingo_reference.checkpoints.conversions import choice
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.config import ConfigError

PREPROCESSOR = "preprocessor_config.json"
Colour = tuple[float, float, float]
BILINEAR, BICUBIC = 2, 3
"""Pillow's numbers of its filters."""
# Settings under which images are prepared as they are here, and their values.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "do_normalize": (True, None),
    "do_rescale": (True, None),
    "do_resize": (True, None),
}


class Images(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and standard deviation of RGB in 0..1."""

    mean: Colour
    std: Colour


def read_images(folder: Path, size: int, default: Images, *, resample: int = BICUBIC, tiles: int | None = None) -> Images:
    """What the file in a folder says, `default` where there is none. size: side of the encoder's square. resample: the filter that the
    family's images are resized with. tiles: most of an image, where it is cut into tiles.

    Raises CheckpointError if it cannot be read, ConfigError if it asks for what is not done here.
    """
    path = folder / PREPROCESSOR
    if not path.is_file():
        return default
    raw = read_json(path)
    for name, plain in _PLAIN.items():
        choice(raw, name, dict.fromkeys(plain), plain[0], where=PREPROCESSOR)
    choice(raw, "resample", {resample: None, None: None}, resample, where=PREPROCESSOR)
    if tiles is not None:
        choice(raw, "max_image_tiles", {tiles: None}, tiles, where=PREPROCESSOR)
    factor = raw.get("rescale_factor")
    if factor is not None and not (isinstance(factor, float) and abs(factor * 255 - 1) < 1e-6):
        raise ConfigError(f"{PREPROCESSOR}: rescale_factor is {factor!r:.80}, which is not supported; expected 1 / 255.")
    for name in ("image_size", "crop_size", *(("size",) if tiles is not None else ())):
        side = raw.get(name, size)
        sides = list(side.values()) if isinstance(side, Mapping) else [side]
        if any(each != size for each in sides):
            raise ConfigError(
                f"{PREPROCESSOR}: {name} is {side!r:.80}, the encoder takes images of {size}. Bring the files of one model."
            )
    return Images(mean=_colour(raw, "image_mean", default.mean), std=_colour(raw, "image_std", default.std))


def _colour(raw: Mapping[str, Any], name: str, default: Colour) -> Colour:
    if raw.get(name) is None:
        return default
    return three_numbers(raw[name], f"{PREPROCESSOR}: {name}")


def three_numbers(value: Any, what: str) -> Colour:
    """The numbers of an RGB colour. Raises ConfigError for anything else."""
    try:
        red, green, blue = msgspec.convert(value, tuple[float, float, float])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{what} is {value!r:.80}, expected three numbers.") from error
    return red, green, blue
