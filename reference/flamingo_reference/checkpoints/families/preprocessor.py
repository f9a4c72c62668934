"""How a model's images were prepared in training, where transformers writes it down beside the model: in preprocessor_config.json, and since
its version 5 as `image_processor` within processor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from flamingo_reference.checkpoints.conversions import choice
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.config import ConfigError

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR, WITHIN = "processor_config.json", "image_processor"
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


def read_images(
    folder: Path,
    size: int,
    default: Images,
    *,
    unsaid: Images | None = None,
    resample: int = BICUBIC,
    tiles: int | None = None,
    crop: bool = False,
) -> Images:
    """What the file in a folder says, `default` where there is none. unsaid: transformers' values where a file says none, if they are not
    `default`. size: side of the encoder's square. resample: the filter that the
    family's images are resized with. tiles: most of an image, where it is cut into tiles. crop: whether the family resizes the shorter side
    and cuts out the middle.

    Raises CheckpointError if it cannot be read, ConfigError if it asks for what is not done here.
    """
    found = _written(folder)
    if found is None:
        return default
    raw, where = found
    for name, plain in (*_PLAIN.items(), ("do_center_crop", (crop, None))):
        choice(raw, name, dict.fromkeys(plain), plain[0], where=where)
    choice(raw, "resample", {resample: None, None: None}, resample, where=where)
    if tiles is not None:
        choice(raw, "max_image_tiles", {tiles: None}, tiles, where=where)
    factor = raw.get("rescale_factor")
    if factor is not None and not (isinstance(factor, float) and abs(factor * 255 - 1) < 1e-6):
        raise ConfigError(f"{where}: rescale_factor is {factor!r:.80}, which is not supported; expected 1 / 255.")
    for name in ("image_size", "crop_size", "size"):
        side = size if raw.get(name) is None else raw[name]
        sides = list(side.values()) if isinstance(side, Mapping) else [side]
        if any(each != size for each in sides):
            raise ConfigError(
                f"{where}: {name} is {side!r:.80}, the encoder takes images of {size}. Bring the files of one model."
            )
    if crop and isinstance(raw.get("size"), Mapping) and "shortest_edge" not in raw["size"]:
        raise ConfigError(
            f"{where}: size is {raw['size']!r:.80}, which stretches images; expected shortest_edge, after which the middle is cut out."
        )
    unsaid = default if unsaid is None else unsaid
    return Images(mean=_colour(raw, "image_mean", unsaid.mean, where), std=_colour(raw, "image_std", unsaid.std, where))


def _written(folder: Path) -> tuple[Mapping[str, Any], str] | None:
    """The settings of a folder's images, and where they stand; None where nothing says any. Of the two files transformers goes by the newer
    one where both have them."""
    newer, older = folder / PROCESSOR, folder / PREPROCESSOR
    within = read_json(newer).get(WITHIN) if newer.is_file() else None
    if within is not None:
        if not isinstance(within, Mapping):
            raise ConfigError(f"{PROCESSOR}: {WITHIN} is {within!r:.80}, expected an object. Fetch the file again.")
        return within, f"{PROCESSOR}, {WITHIN}"
    return (read_json(older), PREPROCESSOR) if older.is_file() else None


def _colour(raw: Mapping[str, Any], name: str, default: Colour, where: str) -> Colour:
    if raw.get(name) is None:
        return default
    return three_numbers(raw[name], f"{where}: {name}")


def three_numbers(value: Any, what: str) -> Colour:
    """The numbers of an RGB colour. Raises ConfigError for anything else."""
    try:
        red, green, blue = msgspec.convert(value, tuple[float, float, float])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{what} is {value!r:.80}, expected three numbers.") from error
    return red, green, blue
