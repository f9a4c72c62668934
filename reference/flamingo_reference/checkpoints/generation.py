"""generation_config.json beside a checkpoint: which of its settings belong to the model, and which are a choice of each request.

Tokens that end a text and tokens that are never generated are the model's. Beams, temperatures, penalties and lengths are named by each
request here, so what the file says of them is shown and not applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.config import TokenIds

GENERATION_CONFIG = "generation_config.json"
_DESCRIBED = (
    "transformers_version",
    "_from_model_config",
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "eos_token_id",
)
_SHOWN = 20  # ids of a setting


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """ends, banned: tokens that the file adds to those that the family knows. not_applied: its other settings that say something."""

    ends: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    not_applied: Mapping[str, Any] = msgspec.field(default_factory=dict)


def read_generation(folder: Path, tokens: TokenIds, vocab_size: int, *, of_part: bool = False) -> Generation:
    """What the generation_config.json in a checkpoint's folder says; nothing where there is none.

    of_part: the folder is only that of the language model, whose own texts end otherwise: what ends them is left out.
    Raises CheckpointError if it cannot be read, or names tokens that are not in the vocabulary.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return Generation()
    raw = read_json(path)
    ends = [] if of_part else _ids(path, "eos_token_id", raw.get("eos_token_id"), vocab_size)
    banned = _ids(path, "suppress_tokens", raw.get("suppress_tokens"), vocab_size)
    words = raw.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(word, list) for word in words):
        raise CheckpointError(
            f"{path}: bad_words_ids is {words!r:.80}, expected a list of lists of token ids. Fetch the file again."
        )
    checked = [_ids(path, "bad_words_ids", word, vocab_size) for word in words]
    # transformers passes over a word that is what ends a text, so as not to make it endless.
    single = [word[0] for word in checked if len(word) == 1]
    banned += [token for token in single if token not in (*tokens.stops, *ends)]
    longer = [word for word in checked if len(word) != 1 or word[0] in (*tokens.stops, *ends)]
    others = {
        name: value
        for name, value in raw.items()
        if name not in (*_DESCRIBED, "suppress_tokens", "bad_words_ids") and value not in (None, [], {})
    }
    if longer:
        others["bad_words_ids"] = longer
    return Generation(
        ends=tuple(dict.fromkeys(token for token in ends if token not in (*tokens.stops, *tokens.never))),
        banned=tuple(dict.fromkeys(token for token in banned if token not in tokens.never)),
        not_applied=others,
    )


def _ids(path: Path, name: str, value: Any, vocab_size: int) -> list[int]:
    """Token ids of a setting that is none, one or a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [each for each in ids if type(each) is not int or not 0 <= each < vocab_size]
    if wrong:
        shown = ", ".join(f"{each!r:.40}" for each in wrong[:_SHOWN])
        raise CheckpointError(
            f"{path}: {name} holds {shown}, expected ids of the model's {vocab_size} tokens. Bring the files of one model."
        )
    return list(ids)
