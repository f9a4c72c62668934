"""Print an answer as it is generated, then where its time went.

python examples/stream_with_timings.py nano.bundle examples/a.png
"""

from __future__ import annotations

import sys

import flamingo_export


def main(bundle: str, image: str) -> None:
    """Streams a caption."""
    with flamingo_export.load(bundle) as model:
        request = flamingo_export.caption_prompt([], image, model.inputs)
        with model.stream(request, beams=1) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
        assert pieces.result is not None
        timings = pieces.result.timings
    steps = timings.steps
    print(
        f"first token after {1000 * timings.first_token:.0f} ms, then {1000 * sum(steps) / max(1, len(steps)):.1f} ms per token"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
