"""What was measured as one self-contained page."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.files import write_atomically
from flamingo_export.pages.plots import bars_plot
from flamingo_export.pages.template import render
from flamingo_export.sensitivity.findings import Sensitivity
from flamingo_export.sensitivity.suggest import STANDS_OUT, Suggestion

_PLOTTED = 40


def write_html(path: Path, found: Sensitivity, suggestion: Suggestion | None) -> None:
    """Writes the page, as a whole or not at all. Raises OSError if it cannot be written."""
    write_atomically(path, render_html(found, suggestion).encode())


def render_html(found: Sensitivity, suggestion: Suggestion | None) -> str:
    """The page."""
    from markupsafe import Markup

    worst = set(suggestion.matrices) if suggestion is not None else set()
    matrices = [(each.name, 100 * each.error, each.name in worst) for each in found.matrices[:_PLOTTED]]
    touched = {each.layer for each in found.matrices if each.name in worst}
    layers = [(each.name, 100 * each.error, each.name in touched) for each in found.layers]
    divergences = [(each.name, each.kl, each.name in touched) for each in found.layers if each.kl is not None]
    return render(
        __package__,
        "sensitivity.html.j2",
        {"percent": _percent, "size": _size},
        found=found,
        policy=found.precision.policy.name if found.precision.policy is not None else found.precision.storage,
        suggestion=suggestion,
        worst=worst,
        limit=STANDS_OUT,
        plotted=_PLOTTED,
        matrices_plot=Markup(bars_plot(matrices, "error, in percent of what the layer adds")),
        layers_plot=Markup(bars_plot(layers, "error, in percent of what the layer adds")),
        kl_plot=Markup(bars_plot(divergences, "KL divergence of the logits, nats")) if divergences else "",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _size(size: int) -> str:
    """Bytes with a sign."""
    return f"{size / 2**20:+,.2f} MiB"
