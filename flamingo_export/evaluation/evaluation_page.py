"""A run as one self-contained page: curve, tables, the best and the worst items with their pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flamingo_export.errors import FlamingoExportError
from flamingo_export.evaluation.metrics.base import Scored
from flamingo_export.evaluation.predictions import Prediction
from flamingo_export.evaluation.results import ALL, Cell, Results
from flamingo_export.evaluation.task import Item
from flamingo_export.files import write_atomically
from flamingo_export.pages import template
from flamingo_export.pages.plots import Curve, axis_of, curves_plot
from flamingo_export.runtime.images import load_image
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.videos import Video, load_video

if TYPE_CHECKING:
    from flamingo_export.evaluation.items import Data

PAGE_FILE = "report.html"
_SHOWN = 6
"""Best items, worst items, and changed answers that are shown."""
_EXAMPLES_SHOWN = 4
_SIDE = 96


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """An item as the page shows it: pictures as PNG files, examples as (picture, what it says)."""

    id: str
    score: float | None
    picture: bytes | None
    question: str
    text: str
    references: tuple[str, ...]
    examples: tuple[tuple[bytes | None, str], ...]
    more_examples: int
    other: str = ""


def write_page(
    out: Path,
    results: Results,
    data: Data,
    predictions: Mapping[int, Sequence[Prediction]],
    others: Mapping[int, Sequence[Prediction]] | None,
    scored: Mapping[int, tuple[Scored, Scored | None]],
) -> None:
    """Writes report.html, as a whole or not at all. Raises OSError if it cannot be written."""
    write_atomically(out / PAGE_FILE, render(results, data, predictions, others, scored).encode())


def render(
    results: Results,
    data: Data,
    predictions: Mapping[int, Sequence[Prediction]],
    others: Mapping[int, Sequence[Prediction]] | None,
    scored: Mapping[int, tuple[Scored, Scored | None]],
) -> str:
    """The page."""
    shots = max(predictions)
    one, _ = scored[shots]
    values = None if one.items is None else one.items.tolist()
    order = [] if values is None else sorted(range(len(values)), key=values.__getitem__)
    examples = {item.id: item for item in data.examples}

    def shown(places: Sequence[int]) -> list[Shown]:
        return [
            _shown(
                data.queries[place],
                predictions[shots][place],
                None if values is None else values[place],
                examples,
                others[shots][place].text if others is not None else "",
            )
            for place in places
        ]

    changed = [
        place
        for place in range(len(data.queries))
        if others is not None and predictions[shots][place].text != others[shots][place].text
    ]
    half = min(_SHOWN, len(order) // 2)
    return page_of(
        results,
        shots=shots,
        best=shown(order[::-1][:half]),
        worst=shown(order[:half]),
        changed=shown(changed[:_SHOWN]),
        num_changed=len(changed),
    )


def page_of(
    results: Results, *, shots: int, best: Sequence[Shown], worst: Sequence[Shown], changed: Sequence[Shown], num_changed: int
) -> str:
    """The page of results and of the items that it shows, those with `shots` shots."""
    from markupsafe import Markup

    return template.render(
        __package__,
        "evaluation.html.j2",
        {"score": score_text, "signed": signed_text},
        results=results,
        shots=shots,
        curve=Markup(_curve(results)) if len(results.settings.shots) > 1 else "",
        overall=[cell for cell in results.cells if cell.group == ALL],
        groups=list(dict.fromkeys(cell.group for cell in results.cells if cell.group != ALL)),
        cell={(cell.group, cell.shots): cell for cell in results.cells},
        details=sorted({name for cell in results.cells for name in cell.details}),
        best=best,
        worst=worst,
        changed=changed,
        num_changed=num_changed,
    )


def score_text(value: float | None) -> str:
    """A score with two digits behind the point; a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def signed_text(value: float | None) -> str:
    """A difference with its sign."""
    return "–" if value is None else f"{value:+.2f}"


def interval_text(cell: Cell) -> str:
    """A cell's value and its interval."""
    if cell.value is None or cell.low is None or cell.high is None:
        return score_text(cell.value)
    return f"{cell.value:.2f} [{cell.low:.2f}, {cell.high:.2f}]"


def _curve(results: Results) -> str:
    cells = [cell for cell in results.cells if cell.group == ALL and cell.value is not None]
    overall = sorted(cells, key=lambda cell: cell.shots)
    curves = [
        Curve(
            name=results.model.get("name", "model"),
            values=[cell.value or 0.0 for cell in overall],
            tone="good",
            low=[cell.low or 0.0 for cell in overall],
            high=[cell.high or 0.0 for cell in overall],
        )
    ]
    if results.against is not None and all(cell.against is not None for cell in overall):
        other = results.against.get("name", "the other")
        curves.append(
            Curve(name=other, values=[cell.against or 0.0 for cell in overall], tone="other", shape="diamond", dash="5 4")
        )
    values = [value for curve in curves for each in (curve.values, curve.low, curve.high) for value in each or ()]
    return curves_plot(
        [str(cell.shots) for cell in overall],
        curves,
        axis_of(values, log=False),
        across="shots",
        up=f"{results.metric}{f', {results.unit}' if results.unit else ''}",
        says="; ".join(f"{cell.shots} shots: {interval_text(cell)}" for cell in overall),
    )


def _shown(item: Item, prediction: Prediction, score: float | None, examples: Mapping[str, Item], other: str) -> Shown:
    chosen = [examples[name] for name in prediction.examples if name in examples]
    unseen = prediction.shots == 0
    return Shown(
        id=item.id,
        score=score,
        picture=picture_of(item.medium),
        question=item.question or "",
        text=prediction.text,
        references=tuple(dict.fromkeys(item.references))[:4],
        examples=tuple(
            (
                None if unseen else picture_of(example.medium),
                f"{example.question + ' ' if example.question else ''}{example.answer}",
            )
            for example in chosen[-_EXAMPLES_SHOWN:]
        ),
        more_examples=max(0, len(chosen) - _EXAMPLES_SHOWN),
        other=other,
    )


def picture_of(medium: MediumSource | None) -> bytes | None:
    """A small PNG of an image, or of a video's middle frame; None for media that are not there or cannot be read."""
    from PIL import Image

    if medium is None:
        return None
    try:
        if isinstance(medium, Video):
            pixels = next(iter(load_video(Video(source=medium.source, num_frames=1, clip=medium.clip), default_frames=1)))
        else:
            pixels = load_image(medium)
    except (FlamingoExportError, OSError, StopIteration):
        return None
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
