"""Compares a bundle's engines with what is expected of them, case by case. What goes wrong on the way becomes a gate that was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flamingo_export.backends.base import Backend, Session, SessionOptions
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.errors import named_line
from flamingo_export.progress import Progress
from flamingo_export.specs import towers_of
from flamingo_export.validate.checks.case_runs import (
    bank_of,
    cached,
    layer_session,
    opened,
    run_stage,
)
from flamingo_export.validate.checks.stored_codes import check_codes, check_roundings
from flamingo_export.validate.checks.tensor_checks import gate, unmeasured
from flamingo_export.validate.expected.cases import (
    END_TO_END_CASE,
    LAYERS_CASE,
    DecoderCase,
    decoder_cases,
    encoder_cases,
    phi_cases,
)
from flamingo_export.validate.expected.decoder_calls import plan_case
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.expected.media_rounding import MediaFormat
from flamingo_export.validate.expected.oracle import encoder_feeds, features_of_media, fed_positions, resampler_feeds
from flamingo_export.validate.report.parity_report import LayerPoint, Level, Row
from flamingo_export.validate.tolerances import POLICY_COSTS, Tolerance, coarsest, layer_tolerance, logits_tolerance, tolerance
from flamingo_reference.arrays import Array

LAYER_BY_LAYER = "layer by layer, for want of memory"


class Checker:
    """One run of all numeric gates. `rows`, `points` and `first_diverging` grow as it goes."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        goldens: Goldens,
        media: MediaFormat,
        backend: Backend,
        options: SessionOptions,
        progress: Progress,
        cases: Sequence[DecoderCase] | None = None,
    ) -> None:
        """cases: of the decoder, None for `decoder_cases`."""
        self.bundle, self.manifest, self.goldens, self.media = bundle, manifest, goldens, media
        self.backend, self.options, self.progress = backend, options, progress
        self.config = manifest.config
        self.rows: list[Row] = []
        self.points: list[LayerPoint] = []
        self.first_diverging: str | None = None
        self._cases = decoder_cases(self.config) if cases is None else cases
        self._plans = {case.name: plan_case(self.config, case) for case in self._cases}
        self._encoded: dict[str, Array] | None = None
        self._arithmetic = backend.arithmetic(manifest, options)

    def run(self, *, whole: bool, layers: Path | None) -> None:
        """All gates. whole: the decoder is run in one piece, and layer by layer besides; else only layer by layer. layers: a folder for
        the layers' graphs; None where there are no engines of single layers, or no such folder."""
        self.progress.stage("engines", 4 + len(towers_of(self.config)) + self.config.language_model.num_layers)
        self.rows += [*check_codes(self.bundle, self.goldens), *check_roundings(self.goldens)]
        self.first_diverging = next((row.subgraph for row in self.rows if row.measured and not row.passed), None)
        self._encoders()
        if whole:
            self._whole_decoder()
        self.progress.advance(1)
        if layers is not None:
            self._layers(layers, all_cases=not whole)
        else:
            self.progress.advance(self.config.language_model.num_layers)
        self._missing(layers=layers is not None)

    # Gates.

    def _gate(
        self,
        level: Level,
        case: str,
        subgraph: str,
        tensor: str,
        actual: Array | None,
        *,
        kind: str,
        note: str = "",
        limits: Tolerance | None = None,
    ) -> Row:
        row = gate(
            self.goldens.get(case, tensor),
            actual,
            tolerance=limits or self._tolerance(kind),
            level=level,
            case=case,
            subgraph=subgraph,
            tensor=tensor,
            note=note,
        )
        self.rows.append(row)
        if (
            row.measured
            and not row.passed
            and level in ("subgraph", "layer")
            and self.first_diverging is None
            and subgraph != "decoder"
        ):
            self.first_diverging = subgraph
        return row

    def _tolerance(self, kind: str) -> Tolerance:
        if kind == "layer":
            checked = self.goldens.code_digests.keys() <= self.goldens.roundings.keys()
            return layer_tolerance(self.manifest.precision, self._arithmetic, weights_checked=checked)
        return tolerance(kind, self.manifest.precision, self._arithmetic)

    @contextmanager
    def _guarded(self, level: Level, case: str, subgraph: str) -> Iterator[None]:
        """What the engine raises leaves a gate unmeasured and does not end the report."""
        try:
            yield
        except Exception as error:
            self.rows.append(unmeasured(level, case, subgraph, "all outputs", named_line(error)))

    # Encoders.

    def _encoders(self) -> None:
        features = latents = None
        for subgraph in ("vision_encoder", "resampler", "media_kv", *towers_of(self.config)):
            with self._guarded("subgraph", f"{subgraph}, opening", subgraph), self._open(subgraph) as session:
                for case in encoder_cases(self.config):
                    if case.subgraph != subgraph:
                        continue
                    name = f"{subgraph}, {case.name}"
                    with self._guarded("subgraph", name, subgraph):
                        results = session.run(encoder_feeds(self.config, case))
                        for output in session.spec.outputs:
                            found = results.get(output.name)
                            if found is not None and output.kind == "fp8":
                                found = self.media.numbers(output.name, found)
                            self._gate("subgraph", name, subgraph, output.name, found, kind=subgraph)
                        features = results.get("features", features)
                if subgraph == "resampler" and features is not None:
                    latents = self._end_to_end_latents(session, features)
                if subgraph == "media_kv" and latents is not None:
                    with self._guarded("end_to_end", END_TO_END_CASE, subgraph):
                        encoded = session.run({"latents": latents})
                        self._encoded = {name: self.media.numbers(name, values) for name, values in encoded.items()}
            self.progress.advance(1)

    def _end_to_end_latents(self, session: Session, features: Array) -> Array | None:
        with self._guarded("end_to_end", END_TO_END_CASE, "resampler"):
            latents = session.run(resampler_feeds(self.config, features_of_media(self.config, features)))["latents"]
            self._gate("end_to_end", END_TO_END_CASE, "resampler", "latents", latents, kind="resampler of encoded frames")
            return latents
        return None

    def _open(self, subgraph: str) -> Any:
        return opened(self.backend, self.bundle, self.manifest, self.manifest.graph(subgraph), self.options)

    # Decoder.

    def _whole_decoder(self) -> None:
        hidden: dict[str, Mapping[int, Array]] = {}
        broken: set[str] = set()
        with self._guarded("subgraph", "decoder, opening", "decoder"):
            for record, layers in self.manifest.decoder_graphs():
                with opened(self.backend, self.bundle, self.manifest, record, self.options) as session:
                    for case in self._cases:
                        if case.name in broken:
                            continue
                        broken.add(case.name)
                        with self._guarded(_level(case), case.name, "decoder"):
                            hidden[case.name] = self._stage(session, case, layers, hidden.get(case.name))
                            broken.discard(case.name)
            for case in self._cases:
                if case.name in hidden and case.name not in broken:
                    self._logits(case, hidden[case.name])

    def _stage(
        self, session: Session, case: DecoderCase, layers: range, hidden: Mapping[int, Array] | None
    ) -> dict[int, Array]:
        """All of a case; where an engine has bounds, its requests in batches that it takes, prefilled in calls that it takes."""
        bank = bank_of(self.config, case, self.media, self._encoded)
        if not session.largest:
            return run_stage(
                session, self.config, self._plans[case.name], self.media, bank, layers=layers, hidden=hidden
            ).output
        output: dict[int, Array] = {}
        at_once = session.largest.get("B", len(case.requests))
        for first in range(0, len(case.requests), at_once):
            batch = msgspec.structs.replace(case, requests=case.requests[first : first + at_once])
            plan = plan_case(self.config, batch, session.largest)
            own = None if hidden is None else {index - first: values for index, values in hidden.items()}
            found = run_stage(session, self.config, plan, self.media, bank, layers=layers, hidden=own).output
            output |= {first + index: values for index, values in found.items()}
        return output

    def _logits(self, case: DecoderCase, output: Mapping[int, Array], note: str = "") -> None:
        fed = fed_positions(self._plans[case.name])
        logits = np.concatenate([output[sequence][positions] for sequence, positions in fed.items()])
        carried = self.goldens.get(LAYERS_CASE, f"layer.{self.config.language_model.num_layers - 1}.carried")
        arriving = carried.torch_error if carried is not None else math.nan
        limits = logits_tolerance(self.manifest.precision, arriving, self._arithmetic)
        self._gate(_level(case), case.name, "decoder", "logits", logits, kind="decoder", note=note, limits=limits)

    # Layer by layer.

    def _layers(self, folder: Path, *, all_cases: bool) -> None:
        carried_cases = [case for case in self._cases if all_cases or case.name == LAYERS_CASE]
        hidden: dict[str, Mapping[int, Array]] = {}
        broken: set[str] = set()
        count = self.config.language_model.num_layers
        for layer in range(count):
            name = f"decoder/layer.{layer}"
            with (
                self._guarded("layer", LAYERS_CASE, name),
                layer_session(self.backend, self.bundle, self.manifest, layer, folder, self.options) as session,
            ):
                alone = self._layer_alone(session, layer, name)
                for case in carried_cases:
                    if case.name in broken:
                        continue
                    broken.add(case.name)
                    with self._guarded(_level(case), case.name, "decoder"):
                        hidden[case.name] = self._stage(session, case, range(layer, layer + 1), hidden.get(case.name))
                        broken.discard(case.name)
                self._point(layer, alone, hidden.get(LAYERS_CASE) if LAYERS_CASE not in broken else None)
            self.progress.advance(1)
        if all_cases:
            for case in carried_cases:
                if case.name in hidden and case.name not in broken:
                    self._logits(case, hidden[case.name], note=LAYER_BY_LAYER)

    def _layer_alone(self, session: Session, layer: int, name: str) -> list[Row]:
        """One layer fed with the reference's hidden states."""
        plan = self._plans[LAYERS_CASE]
        (case,) = (case for case in self._cases if case.name == LAYERS_CASE)
        fed = self.goldens.hidden.get(str(layer))
        if fed is None:
            row = unmeasured("layer", LAYERS_CASE, name, "input", "no hidden states were recorded for it")
            self.rows.append(row)
            return [row]
        result = run_stage(
            session,
            self.config,
            plan,
            self.media,
            bank_of(self.config, case, self.media, self._encoded),
            layers=range(layer, layer + 1),
            hidden={0: fed} if layer else None,
        )
        rows = []
        for kind in "kv":
            values = cached(plan, result.caches[f"past_{kind}.{layer}"], 0)
            rows.append(self._gate("layer", LAYERS_CASE, name, f"layer.{layer}.{kind}", values, kind="layer"))
        kv_passed = all(row.passed for row in rows)
        where = "keys and values agree, so it is in self-attention or feed-forward" if kv_passed else ""
        rows.append(self._gate("layer", LAYERS_CASE, name, f"layer.{layer}.output", result.output[0], kind="layer"))
        if where and not rows[-1].passed:
            rows[-1] = self.rows[-1] = _with_note(rows[-1], where)
        self._policy_cost(layer, name)
        return rows

    def _policy_cost(self, layer: int, name: str) -> None:
        """Whether what the policy itself costs is within its bound: engine and reference agree on a wrong range, too."""
        limit = POLICY_COSTS.get(coarsest(self.manifest.precision) or "")
        if limit is None:
            return
        found = self.goldens.policy_costs.get(str(layer))
        if found is None:
            cost = f"layer.{layer}.cost of the policy"
            self.rows.append(unmeasured("layer", LAYERS_CASE, name, cost, "no cost was recorded"))
            return
        passed = found <= limit
        note = (
            ""
            if passed
            else "the policy costs too much here: a wrong range in the calibration table, or a layer to keep in more bits"
        )
        row = Row(
            level="layer", case=LAYERS_CASE, subgraph=name, tensor=f"layer.{layer}.cost of the policy",
            error=found if math.isfinite(found) else None, limit=limit, torch_error=None, passed=passed, note=note,
        )  # fmt: skip
        self.rows.append(row)
        if not passed and self.first_diverging is None:
            self.first_diverging = name

    def _point(self, layer: int, alone: list[Row], carried: Mapping[int, Array] | None) -> None:
        expected = self.goldens.get(LAYERS_CASE, f"layer.{layer}.carried")
        row = gate(
            expected,
            carried[0] if carried else None,
            tolerance=self._tolerance("layer"),
            level="layer",
            case=LAYERS_CASE,
            subgraph="decoder",
            tensor=f"layer.{layer}.carried",
        )
        output = alone[-1]
        if not output.measured:
            return
        self.points.append(
            LayerPoint(
                layer=layer,
                alone=output.error,
                carried=row.error,
                torch_alone=output.torch_error,
                torch_carried=row.torch_error,
                limit=output.limit,
                passed=all(each.passed for each in alone),
            )
        )

    def _missing(self, *, layers: bool) -> None:
        """A case that left no gate behind was not measured."""
        seen = {(row.level, row.case) for row in self.rows}
        wanted: list[tuple[Level, str, str]] = [
            ("subgraph", f"{case.subgraph}, {case.name}", case.subgraph) for case in encoder_cases(self.config)
        ]
        wanted += [("phi", name, "decoder") for name in phi_cases(self.config)]
        wanted += [("subgraph", LAYERS_CASE, "decoder"), ("end_to_end", END_TO_END_CASE, "decoder")]
        wanted += [("end_to_end", case.name, "decoder") for case in self._cases if case.from_pixels]
        for level, case, subgraph in wanted:
            if (level, case) not in seen:
                self.rows.append(unmeasured(level, case, subgraph, "all outputs", "the case was not run"))
        checked = {row.subgraph for row in self.rows if row.level == "layer"}
        for layer in range(self.config.language_model.num_layers if layers else 0):
            name = f"decoder/layer.{layer}"
            if name not in checked:
                self.rows.append(unmeasured("layer", LAYERS_CASE, name, "all outputs", "the layer was not run"))


def _level(case: DecoderCase) -> Level:
    if case.from_pixels:
        return "end_to_end"
    return "subgraph" if case.name == LAYERS_CASE else "phi"


def _with_note(row: Row, note: str) -> Row:
    return msgspec.structs.replace(row, note=f"{row.note}; {note}" if row.note else note)
