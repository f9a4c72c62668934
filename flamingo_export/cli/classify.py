"""`flamingo-export classify`: an image classified by labels, zero-shot, by the contrastive encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.common_options import AsJson
from flamingo_export.cli.groups import Running


def classify(
    bundle: Annotated[Path, typer.Argument(help="A bundle with a contrastive encoder.", show_default=False)],
    images: Annotated[
        list[Path],
        typer.Option("--image", "-i", metavar="FILE", help="What to classify; may be given again.", show_default=False),
    ],
    labels: Annotated[
        str, typer.Option("--labels", "-l", metavar="A,B,C", help="Labels, separated by commas.", show_default=False)
    ],
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="The text that a label is put into, with {} for it. Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    run: Running = Running(),
    as_json: AsJson = False,
) -> None:
    """Classify images by labels that the model was not trained on, the most likely first.

    \b
    flamingo-export classify nano.bundle --image a.png --labels "a red circle,a blue square"
    """
    from flamingo_export.cli.output import print_json, results, table

    names = [label.strip() for label in labels.split(",")]
    if not all(names):
        raise typer.BadParameter(f"{labels!r} has an empty label; give some, separated by commas", param_hint="--labels")
    with run.opened_encoder(bundle) as encoder:
        encoder.label_texts(names, template)  # what cannot work is said before any image is read
        found = [(image, encoder.classify(image, names, template=template)) for image in images]
    if as_json:
        print_json(
            [
                {
                    "image": str(image),
                    "labels": [{"label": s.label, "probability": s.probability, "cosine": s.cosine} for s in scores],
                }
                for image, scores in found
            ]
        )
        return
    for image, scores in found:
        if len(found) > 1:
            results().print(f"{image}:")
        rows = [(score.label, f"{score.probability:.3f}", f"{score.cosine:.4f}") for score in scores]
        results().print(table(("label", "probability", "cosine"), rows, right=(1, 2)))
