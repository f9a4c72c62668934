"""The parity report: what was compared, with what, and how it went. Written as reports/parity.json; `html.py` draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from flamingo_export.files import write_atomically
from flamingo_export.precision import StorageType

Verdict = Literal["passed", "failed", "not_run"]
Against = Literal["reference", "golden", "transformers"]
Level = Literal["weights", "subgraph", "layer", "phi", "end_to_end", "trace", "task"]

REPORT_SCHEMA = 1
REPORT_JSON = "reports/parity.json"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One gate. `error` and `limit` are largest absolute difference over the reference's rms; None where there is no number.

    measured: False where engine or reference gave nothing to compare, and `note` says why; such a gate has neither passed nor failed.
    """

    level: Level
    case: str
    subgraph: str
    tensor: str
    error: float | None
    limit: float | None
    torch_error: float | None = None
    """PyTorch's own error against fp64, with weights in the bundle's type and in the engines' arithmetic: the limit is made from it."""
    passed: bool
    measured: bool = True
    note: str = ""

    @property
    def outcome(self) -> str:
        """For people."""
        return "not measured" if not self.measured else "passed" if self.passed else "failed"


class TokenStep(msgspec.Struct, frozen=True, kw_only=True):
    """One position of a trace: the reference's token, the engine's, and the reference's margin over its next best choice."""

    reference: int | None
    engine: int | None
    gap: float | None = None
    """In summed log-probability."""
    reference_label: str = ""
    engine_label: str = ""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that the runtime on the engine generated, beside those of the reference's plain search."""

    case: str
    search: Literal["greedy", "beam"]
    num_beams: int
    prompt: str
    outcome: Literal["equal", "tie", "different", "failed", "not_run"]
    """failed: in reports of version 0.1.0, where `not_run` is said now."""
    steps: tuple[TokenStep, ...]
    reference_text: str | None = None
    engine_text: str | None = None
    media: tuple[bytes, ...] = ()
    """PNG files: the first frame of each medium, for the eye."""
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome in ("equal", "tie")


class LayerPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Errors after one LM layer: fed with the reference's hidden states (`alone`), and with the engine's own (`carried`)."""

    layer: int
    alone: float | None
    carried: float | None
    torch_alone: float | None
    torch_carried: float | None
    limit: float | None
    passed: bool


class Strip(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence of a case, for the eye. Each token: the bank row it sees plus one, 0 for none, negative at the `<image>` itself.

    The first `prompt` tokens are prefilled, the others decoded.
    """

    tokens: tuple[int, ...]
    prompt: int


class NotRun(msgspec.Struct, frozen=True, kw_only=True):
    """A check that was left out, and why: want of memory, or of a folder for temporary files."""

    name: str
    reason: str


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of parity found.

    verdict: `failed` if a gate failed; `passed` if all were measured and passed; else `not_run`: some were not measured, or there are none.
    """

    verdict: Verdict
    backend: str
    against: Against | None
    model: str
    storage: str
    arithmetic: StorageType = "fp32"
    """What the engines compute in, and PyTorch where its errors make the limits."""
    weights: str
    """Digest of the weights that the reference had, or why there was no reference."""
    rows: tuple[Row, ...] = ()
    layers: tuple[LayerPoint, ...] = ()
    first_diverging_layer: str | None = None
    traces: tuple[Trace, ...] = ()
    strips: dict[str, tuple[Strip, ...]] = msgspec.field(default_factory=dict)
    """The sequences of each hard case of phi."""
    not_run: tuple[NotRun, ...] = ()
    corrections: str = ""
    """What the model compared with was changed in, because it errs there; empty where it is as it is."""
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    seconds: float = 0.0
    schema: int = REPORT_SCHEMA

    @property
    def failures(self) -> tuple[Row, ...]:
        """The gates that failed."""
        return tuple(row for row in self.rows if row.measured and not row.passed)

    @property
    def unmeasured(self) -> tuple[Row, ...]:
        """The gates in which there was nothing to compare."""
        return tuple(row for row in self.rows if not row.measured)

    @property
    def summary(self) -> str:
        """One line for a terminal."""
        if not self.rows:
            return f"parity not run on {self.backend}: nothing was compared"
        passed = sum(row.passed for row in self.rows)
        verdict = {"not_run": "not established"}.get(self.verdict, self.verdict)
        text = f"parity {verdict} on {self.backend} against {self.against}: {passed} of {len(self.rows)} gates"
        if self.traces:
            equal = sum(trace.outcome == "equal" for trace in self.traces)
            ties = sum(trace.outcome == "tie" for trace in self.traces)
            text += f", {equal} of {len(self.traces)} token traces equal" + (f" ({ties} ties)" if ties else "")
        if self.corrections:
            text += f" ({self.corrections})"
        if self.first_diverging_layer:
            text += f"; first diverging layer: {self.first_diverging_layer}"
        elif self.failures:
            worst = self.failures[0]
            text += f"; first failure: {worst.case}, {worst.tensor} ({worst.note or 'error above limit'})"
        if self.unmeasured:
            first = self.unmeasured[0]
            text += f"; {len(self.unmeasured)} not measured, the first: {first.case}, {first.tensor} ({first.note})"
        return text


def write_report(folder: Path, report: ParityReport) -> Path:
    """Writes reports/parity.json below `folder`, atomically, and returns its path."""
    path = folder / REPORT_JSON
    write_atomically(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return path


def read_report(folder: Path) -> ParityReport | None:
    """The report that was last written below `folder`, or None where there is none (or one of another schema)."""
    try:
        return msgspec.json.decode((folder / REPORT_JSON).read_bytes(), type=ParityReport)
    except (OSError, msgspec.MsgspecError):
        return None
