"""What nvidia-modelopt finds on the same data, recorded: `python tests/calibration/modelopt_oracle.py` writes data/modelopt.json.

modelopt is not a dependency of the tests: it imports for 20 seconds and brings a dozen packages. Its figures are recorded with its version,
and a test records them anew where it is installed (pip install nvidia-modelopt requests).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RECORDED = Path(__file__).parent / "data" / "modelopt.json"
STRIDE, FIRST, BINS = 16, 128, 2048
"""modelopt's histogram and the thresholds that it tries: every sixteenth edge from the 128th on."""
DRAWN = ("normal", "heavy", "squared_relu")


def drawn(kind: str) -> npt.NDArray[np.float32]:
    """Numbers as activations are distributed, without exact zeros: float32 [201, 499].

    99.99 % of them is not a whole number, which modelopt's sums of shares would miss by one.
    """
    rng = np.random.default_rng([7, DRAWN.index(kind)])
    shape = (201, 499)
    if kind == "heavy":
        return rng.standard_t(4, shape).astype(np.float32)
    normal = rng.standard_normal(shape)
    values = normal if kind == "normal" else np.where(normal > 0, normal, 0.01 * normal) ** 2
    return values.astype(np.float32)


def figures() -> dict[str, Any]:
    """modelopt's thresholds: amax of every product's input in a model, by its quantised modules; its histogram methods on drawn numbers."""
    import modelopt
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.calib import HistogramCalibrator, histogram
    from variations import drawn_model

    from flamingo_calibration import shipped_samples
    from tests.calibration.conftest import CONFIGS, named_modules, run_whole

    amax: dict[str, dict[str, float]] = {}
    for config in CONFIGS.values():
        samples = shipped_samples(config, None)

        def run(model: Any, samples: Any = samples) -> None:
            for sample in samples:
                run_whole(model, sample, lambda *_: None)

        quantized = mtq.quantize(drawn_model(config), mtq.FP8_DEFAULT_CFG, forward_loop=run)
        amax[config.name] = {name: float(module.input_quantizer.amax) for name, module in named_modules(quantized)}
    # modelopt 0.47 calls its own rounding to E4M3 without the bias that it takes third, and fails.
    rounded = histogram.scaled_e4m3
    histogram.scaled_e4m3 = lambda values, amax, exponent, mantissa: rounded(values, amax, None, exponent, mantissa)
    methods: dict[str, dict[str, float]] = {}
    for kind in DRAWN:
        fp8, int8 = HistogramCalibrator(num_bits=(4, 3)), HistogramCalibrator(num_bits=8)  # entropy is for integers alone
        for calibrator in (fp8, int8):
            calibrator.collect(torch.from_numpy(drawn(kind)))
        methods[kind] = {
            "percentile": float(fp8.compute_amax("percentile", percentile=99.99)),
            "mse": float(fp8.compute_amax("mse")),
            "entropy": float(int8.compute_amax("entropy", stride=STRIDE, start_bin=FIRST)),
        }
    histogram.scaled_e4m3 = rounded
    return {"modelopt": modelopt.__version__, "torch": torch.__version__.split("+")[0], "amax": amax, "methods": methods}


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[1:1] = [str(root), str(root / "tests/helpers")]
    RECORDED.write_text(json.dumps(figures(), indent=1) + "\n")
