"""Classify an image by scoring candidate answers, without generating.

python examples/score_candidates.py nano.bundle examples/q.png "What colour is the square?" red green blue purple
"""

from __future__ import annotations

import math
import sys

import flamingo_export


def main(bundle: str, image: str, question: str, *candidates: str) -> None:
    """Prints each candidate with its share of the probability of all, likeliest first."""
    with flamingo_export.load(bundle) as model:
        request = flamingo_export.qa_prompt([], question, image, model.inputs)
        scores = model.score(request, candidates)
    total = math.log(sum(math.exp(score.logprob) for score in scores))
    for score in sorted(scores, key=lambda score: -score.logprob):
        print(f"{score.candidate}: {100 * math.exp(score.logprob - total):.1f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
