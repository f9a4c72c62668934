"""The paper's figures (Alayrac et al. 2022, arXiv 2204.14198), to stand beside a user's. Empty where our sources have none.

Where two sources disagree both are given. Fine-tuned state of the art: of the paper's time, without examples.
"""

from __future__ import annotations

from types import MappingProxyType

import msgspec


class PaperFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of one task by model; texts, since some are conflicting or were measured on another split.

    at_32: 80B with 32 shots. at_4: 3B, 9B, 80B with 4 shots. best_then: the fine-tuned state of the art. fine_tuned: 80B fine-tuned.
    """

    at_32: str = ""
    best_then: str = ""
    at_4: tuple[str, str, str] = ("", "", "")
    fine_tuned: str = ""


def _row(at_32: str, best_then: str, at_4: tuple[str, str, str] = ("", "", ""), fine_tuned: str = "") -> PaperFigures:
    return PaperFigures(at_32=at_32, best_then=best_then, at_4=at_4, fine_tuned=fine_tuned)


FIGURES = MappingProxyType(
    {
        "okvqa": _row("57.8", "54.4", ("43.3", "49.3", "57.4")),
        "vqav2": _row("67.6", "80.2", ("53.2", "56.3", "63.1"), "82.0 (test-dev)"),
        "coco": _row("113.8", "143.3", ("85.0", "93.1", "103.2"), "138.1"),
        "msvdqa": _row("52.3", "47.9", ("33.0", "36.2", "41.7")),
        "vatex": _row("65.1", "76.3", ("50.0", "51.7", "56.0"), "84.2"),
        "vizwiz": _row("49.8", "57.2", fine_tuned="65.7 (test-dev)"),
        "flickr30k": _row("75.4", "67.4"),
        "msrvttqa": _row("31.0", "46.8", fine_tuned="47.4"),
        "ivqa": _row("45.3", "35.4"),
        "youcook2": _row("86.8", "138.7", fine_tuned="118.6"),
        "star": _row("42.2", "36.7"),
        "visdial": _row("55.6 (elsewhere 56.8)", "75.2", fine_tuned="61.8"),
        "textvqa": _row("37.9 (elsewhere 36.0)", "54.7", fine_tuned="57.1"),
        "nextqa": _row("33.5", "25.2"),
        "hateful_memes": _row("70.0", "79.1", fine_tuned="86.6 (test seen)"),
        "rareact": _row("60.8 (0 shots)", ""),
        "imagenet": _row("66.4 random, 71.7 to 76.0 RICES 16, 77.3 with ensembling", ""),
        "kinetics700": _row("51.2 random, 62.7 to 63.5 RICES 16, 64.2 with ensembling", ""),
    }
)
