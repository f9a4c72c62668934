"""An image as `vision_encoder` takes it: float32 [1, 3, I, I], resized, cut and normalised as the bundle's manifest.json says.

python pixels.py nano.bundle examples/a.png pixels.f32
"""

import sys
from pathlib import Path

from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.runtime.media import load_medium

bundle, image, out = map(Path, sys.argv[1:])
manifest = read_manifest(bundle)
load_medium(image, manifest.config, manifest.inputs.fit).pixels.astype("<f4").tofile(out)
