"""How much error quantising each matrix adds, and what to keep in more bits: `flamingo-export sensitivity`.

    report        what was measured, a plain structure
    measure       measure(): part by part on samples, as calibration runs the reference
    divergence    what a layer's error does to the logits, where the whole model fits in memory
    suggest       matrices that stand out, and a policy that keeps them in more bits
    html          all of it as a page

torch is imported inside functions.
"""

from __future__ import annotations

from flamingo_export.sensitivity.findings import LayerError, MatrixError, Sensitivity
from flamingo_export.sensitivity.measure import measure
from flamingo_export.sensitivity.suggest import Suggestion, suggest

__all__ = ["LayerError", "MatrixError", "Sensitivity", "Suggestion", "measure", "suggest"]
