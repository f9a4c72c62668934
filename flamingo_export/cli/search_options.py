"""Options of `generate` that steer the search: what is never said, what ends it, what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", min=0.0, max=1.0, help="Sample from tokens at least this likely beside the likeliest.", show_default=False
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the answer before this text; repeat for more.", show_default=False),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", metavar="ID=BIAS", help="Add this to a token's logit; repeat for more.", show_default=False),
]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: tokens that were there become less likely.")
]
NoRepeatNgram = Annotated[
    int, typer.Option("--no-repeat-ngram", min=0, help="No sequence of so many tokens twice; 0 allows it.")
]
MinNewTokens = Annotated[int, typer.Option("--min-new-tokens", min=0, help="Tokens before the answer may end.")]
EarlyStopping = Annotated[bool, typer.Option("--early-stopping", help="Beams end as soon as there are enough finished texts.")]
TopLogprobs = Annotated[
    int,
    typer.Option("--top-logprobs", min=0, help="Report so many likeliest tokens at each place (--json, --requests)."),
]

Schema = Annotated[
    Path | None,
    typer.Option(
        "--json-schema", metavar="FILE", help="The answer is JSON of this schema (extra constraints).", show_default=False
    ),
]
Regex = Annotated[
    str | None, typer.Option("--regex", metavar="EXPRESSION", help="The whole answer matches this.", show_default=False)
]
Choice = Annotated[
    list[str] | None,
    typer.Option("--choice", metavar="TEXT", help="The answer is one of these; repeat for more.", show_default=False),
]


def schema_in(file: Path | None) -> dict[str, Any] | bool | None:
    """The schema in a file. Raises typer.BadParameter if it cannot be read, or is not a JSON object."""
    if file is None:
        return None
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}", param_hint="--json-schema") from None
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{file} is not JSON: {error}", param_hint="--json-schema") from None
    if not isinstance(found, dict | bool):
        raise typer.BadParameter(f"{file} holds {type(found).__name__}, expected an object", param_hint="--json-schema")
    return found


def biases(given: Sequence[str] | None) -> dict[int, float]:
    """Token id -> bias, of texts ID=BIAS. Raises typer.BadParameter for another text, or a token that is named twice."""
    found: dict[int, float] = {}
    for text in given or ():
        token, _, bias = text.partition("=")
        try:
            known, found[int(token)] = len(found), float(bias)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is not a token id and a bias; write 17=-2.5", param_hint="--logit-bias"
            ) from None
        if len(found) == known:
            raise typer.BadParameter(f"token {int(token)} has two biases", param_hint="--logit-bias")
    return found
