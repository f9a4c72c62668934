"""`flamingo-export sensitivity`: the error that quantising each matrix adds, and what to keep in more bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from flamingo_export.cli.common_options import (
    AsJson,
    SampleData,
    SizeName,
    SkipBad,
    check_written,
    chosen_samples,
    fault_after,
)
from flamingo_export.cli.groups import Beside, Quantised

if TYPE_CHECKING:
    from flamingo_export.precision import Policy, Precision
    from flamingo_export.sensitivity import Sensitivity, Suggestion
    from flamingo_export.sources import WeightSource
    from flamingo_export.sources.choice import CheckpointFolder

_SHOWN = 30


class _Subject(msgspec.Struct, frozen=True, kw_only=True):
    """Whose weights are quantised how. calibration: a table to read, weights_sha256: of the source; None where they are not known."""

    source: WeightSource
    precision: Precision
    calibration: Path | None = None
    weights_sha256: str | None = None


def sensitivity(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="A bundle; weights are read from the checkpoint it was built from. Without it: --size or --checkpoint.",
            show_default=False,
        ),
    ] = None,
    size: SizeName = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="A checkpoint; beside a bundle, the one that it was built from.", show_default=False),
    ] = None,
    beside: Beside = Beside(),
    quantised: Quantised = Quantised(),
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Ranges of activations. Default the bundle's own, else measured on the samples.",
            show_default=False,
        ),
    ] = None,
    data: SampleData = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of random weights, also for nano.", show_default=False)
    ] = None,
    skip_bad: SkipBad = False,
    suggested: Annotated[
        Path | None,
        typer.Option(
            "--suggest", metavar="FILE", help="Write a policy that keeps in more bits what stands out.", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the result as a self-contained page.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantise one matrix after the other in the PyTorch reference and measure what its layer's output changes.

    Quantised as --fp8, --int8, --int4 or --policy say, else as the bundle is.

    \b
    flamingo-export sensitivity nano.bundle --fp8 --html s.html
    flamingo-export sensitivity --checkpoint ckpt/ --int4 --data calib.jsonl --suggest mine.toml
    """
    from flamingo_calibration import source_tokenizer
    from flamingo_export.cli.output import print_json
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.errors import BuildError
    from flamingo_export.files import write_atomically
    from flamingo_export.sensitivity import measure, suggest
    from flamingo_export.weights.calibration_table import read_table

    chosen = quantised.chosen()
    check_written(html, "--html")
    check_written(suggested, "--suggest")
    if suggested is not None and suggested.exists():
        raise BuildError(f"{suggested} exists. Choose another file for --suggest.")
    if bundle is None:
        named = beside.source(size, checkpoint, seed)
        subject = _of_weights(named, chosen)
    else:
        for option, given in {"--size": size, "--seed": seed}.items():
            if given is not None:
                raise typer.BadParameter("a bundle has its weights; leave one of the two out", param_hint=option)
        if checkpoint is None and beside:
            raise typer.BadParameter("parts go with a checkpoint: add --checkpoint", param_hint="--checkpoint")
        files = beside.files(checkpoint) if checkpoint is not None else None
        subject = _of_bundle(bundle, files, chosen)
    path = calibration or subject.calibration
    spelled = source_tokenizer(subject.source)
    with reported() as progress:
        found = measure(
            subject.source,
            chosen_samples(data, subject.source, spelled),
            tokenizer=spelled,
            precision=subject.precision,
            calibration=read_table(path) if path is not None else None,
            weights_sha256=subject.weights_sha256,
            skip_bad=skip_bad,
            progress=progress,
        )
    suggestion = suggest(found)

    def files_of_it() -> None:
        if html is not None:
            from flamingo_export.sensitivity.sensitivity_page import write_html

            write_html(html, found, suggestion)
        if suggested is not None and suggestion is not None:
            write_atomically(suggested, suggestion.text.encode())

    with fault_after(files_of_it) as written:
        if as_json:
            print_json({"sensitivity": found, "suggestion": suggestion})
        else:
            _print(found, suggestion, suggested if written else None, html if written else None)


def _of_weights(named: Any, policy: Policy | None) -> _Subject:
    from flamingo_export.pipeline.build_request import resolve_precision
    from flamingo_export.sources import open_source

    source = open_source(named)
    return _Subject(source=source, precision=resolve_precision(source.config, None, _given(policy)))


def _of_bundle(bundle: Path, checkpoint: CheckpointFolder | None, policy: Policy | None) -> _Subject:
    """Raises CheckpointError where the bundle's weights are not at hand."""
    from flamingo_export.bundle.verify import open_bundle
    from flamingo_export.sources.origin import find_origin
    from flamingo_export.weights.calibration_table import CALIBRATION_FILE

    manifest = open_bundle(bundle)
    policy = _given(policy or manifest.precision.policy)
    table = bundle / CALIBRATION_FILE
    return _Subject(
        source=find_origin(manifest, checkpoint),
        precision=msgspec.structs.replace(manifest.precision, policy=policy),
        calibration=table if table.is_file() else None,
        weights_sha256=manifest.source.sha256,
    )


def _given(policy: Policy | None) -> Policy:
    if policy is None:
        raise typer.BadParameter(
            "nothing is quantised. Say how it should be: --fp8, --int8, --int4 or --policy FILE", param_hint="--policy"
        )
    return policy


def _print(found: Sensitivity, suggestion: Suggestion | None, file: Path | None, html: Path | None) -> None:
    from flamingo_export.cli.output import human_bytes, results, table

    console = results()
    standing_out = set(suggestion.matrices) if suggestion is not None else set()
    rows = [
        (
            each.name,
            each.element,
            _percent(each.error),
            "*" if each.name in standing_out else "",
            each.keep,
            "-" if each.kind == "operand" else _signed(each.extra_bytes),
        )
        for each in found.matrices[:_SHOWN]
    ]
    policy = found.precision.policy
    title = (
        f"Flamingo {found.config.name}, {policy.name if policy else found.precision.storage}: error that each adds to its layer, worst first "
        f"({found.samples} samples, {found.tokens} tokens, {found.images} images)"
    )
    columns = ("quantised", "to", "error", "", "kept in", "takes")
    console.print(table(columns, rows, title=title, right=(2, 5)))
    if len(found.matrices) > _SHOWN:
        console.print(f"and {len(found.matrices) - _SHOWN} more with smaller errors; --json and --html show all", markup=False)
    layers = [
        (layer.name, _percent(layer.error), _percent(layer.share), "-" if layer.kl is None else f"{layer.kl:.2g}")
        for layer in found.layers
    ]
    of_layer = ("layer, all of it quantised", "error", "what it adds, of its output", "KL of logits, nats a token")
    console.print(table(of_layer, layers, right=(1, 2, 3)))
    kl = f"{found.kl:.2g} nats a token" if found.kl is not None else f"not measured: {found.no_kl}"
    console.print(f"KL of the logits with everything quantised: {kl}", markup=False)
    if suggestion is None:
        console.print(
            f"no error stands out: nothing to keep in more bits{f', {file} not written' if file else ''}", markup=False
        )
    else:
        share = 100 * suggestion.extra_bytes / suggestion.weight_bytes
        console.print(
            f"* stands out: more than twice the median. To keep {len(standing_out)} in more bits takes {_signed(suggestion.extra_bytes)} "
            f"({share:+.1f} % of {human_bytes(suggestion.weight_bytes)})",
            markup=False,
        )
        console.print(f"policy: {file}" if file else "--suggest mine.toml writes a policy that does", markup=False)
    if html is not None:
        console.print(f"page: {html}", markup=False)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _signed(size: int) -> str:
    from flamingo_export.cli.output import human_bytes

    return f"{'-' if size < 0 else '+'}{human_bytes(abs(size))}"
