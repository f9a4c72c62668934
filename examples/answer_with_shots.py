"""Ask about an image after a few examples: a Flamingo learns the task from them.

python examples/answer_with_shots.py nano.bundle examples/shots_questions.jsonl examples/q.png "What colour is the square?"
"""

from __future__ import annotations

import sys

import flamingo_export


def main(bundle: str, shots: str, image: str, question: str) -> None:
    """Prints the answer, and what else the beams found."""
    with flamingo_export.load(bundle) as model:
        found = model.ask(image, question, shots=shots, beams=3, num_return=3)
    print(found.text)
    for other in found.alternatives:
        print(f"  or: {other.text} ({other.score:.2f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
