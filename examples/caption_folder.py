"""Caption every image of a folder.

python examples/caption_folder.py nano.bundle examples/images
"""

from __future__ import annotations

import sys
from pathlib import Path

import flamingo_export


def main(bundle: str, folder: str) -> None:
    """Prints a line per image, in the order of their names."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    with flamingo_export.load(bundle) as model:
        prompts = [flamingo_export.caption_prompt([], path, model.inputs) for path in paths]
        for path, found in zip(paths, model.generate(prompts), strict=True):
            print(f"{path.name}: {found.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
