"""A run as one self-contained page, in the parity report's style: curve, tables, the best and the worst items with their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flamingo_export.errors import EvaluationError, FlamingoExportError, pip_install
from flamingo_export.evaluation.metrics.base import Scored
from flamingo_export.evaluation.predictions import Prediction
from flamingo_export.evaluation.results import ALL, Cell, Results
from flamingo_export.evaluation.task import Item
from flamingo_export.files import write_atomically
from flamingo_export.runtime.images import load_image
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.videos import Video, load_video

if TYPE_CHECKING:
    from flamingo_export.evaluation.data import Data

PAGE_FILE = "report.html"
_SHOWN = 6
"""Best items, worst items, and changed answers that are shown."""
_EXAMPLES_SHOWN = 4
_SIDE = 96
_MINE, _OTHER = "#0f766e", "#7c3aed"


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


def require_plots() -> None:
    """Raises EvaluationError where matplotlib is missing, without which there is no curve."""
    if find_spec("matplotlib") is None:
        raise EvaluationError(
            f"the page's curve needs matplotlib. Install it: {pip_install('report')}; or leave the page out (report=False)"
        )


def write_page(
    out: Path,
    results: Results,
    data: Data,
    said: Mapping[int, Sequence[Prediction]],
    others: Mapping[int, Sequence[Prediction]] | None,
    scored: Mapping[int, tuple[Scored, Scored | None]],
) -> None:
    """Writes report.html, as a whole or not at all. Raises ParityError where matplotlib is missing, OSError if it cannot be written."""
    write_atomically(out / PAGE_FILE, render(results, data, said, others, scored).encode())


def render(
    results: Results,
    data: Data,
    said: Mapping[int, Sequence[Prediction]],
    others: Mapping[int, Sequence[Prediction]] | None,
    scored: Mapping[int, tuple[Scored, Scored | None]],
) -> str:
    """The page."""
    from markupsafe import Markup

    shots = max(said)
    one, _ = scored[shots]
    values = None if one.items is None else one.items.tolist()
    order = [] if values is None else sorted(range(len(values)), key=values.__getitem__)
    examples = {item.id: item for item in data.examples}

    def shown(places: Sequence[int]) -> list[Shown]:
        return [
            _shown(
                data.queries[place],
                said[shots][place],
                None if values is None else values[place],
                examples,
                others[shots][place].text if others is not None else "",
            )
            for place in places
        ]

    changed = [
        place
        for place in range(len(data.queries))
        if others is not None and said[shots][place].text != others[shots][place].text
    ]
    half = min(_SHOWN, len(order) // 2)
    text = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    page: str = _template(text).render(
        results=results,
        shots=shots,
        curve=Markup(_curve(results)) if len(results.settings.shots) > 1 else "",
        overall=[cell for cell in results.cells if cell.group == ALL],
        groups=list(dict.fromkeys(cell.group for cell in results.cells if cell.group != ALL)),
        cell={(cell.group, cell.shots): cell for cell in results.cells},
        details=sorted({name for cell in results.cells for name in cell.details}),
        best=shown(order[::-1][:half]),
        worst=shown(order[:half]),
        changed=shown(changed[:_SHOWN]),
        num_changed=len(changed),
    )
    return page


def _template(text: str) -> Any:
    from flamingo_export.validate.report.parity_page import page_template

    return page_template(text, {"picture": _address, "score": score_text, "signed": signed_text})


def _address(png: bytes) -> str:
    """A PNG file as the address of an `<img>`."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


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
    from flamingo_export.validate.report.plots import curves_plot

    overall = sorted(
        (cell for cell in results.cells if cell.group == ALL and cell.value is not None), key=lambda cell: cell.shots
    )
    mine = [(cell.value or 0.0, cell.low or 0.0, cell.high or 0.0) for cell in overall]
    series = [(results.model.get("name", "model"), _MINE, mine)]
    if results.against is not None and all(cell.against is not None for cell in overall):
        other = [(cell.against or 0.0,) * 3 for cell in overall]
        series.append((results.against.get("name", "the other"), _OTHER, other))
    unit = f", {results.unit}" if results.unit else ""
    return curves_plot(
        [str(cell.shots) for cell in overall], series, across="shots", up=f"{results.metric}{unit}", salt="curve"
    )


def _shown(item: Item, said: Prediction, score: float | None, examples: Mapping[str, Item], other: str) -> Shown:
    chosen = [examples[name] for name in said.examples if name in examples]
    unseen = said.shots == 0
    return Shown(
        id=item.id,
        score=score,
        picture=picture_of(item.medium),
        question=item.question or "",
        text=said.text,
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
