"""`flamingo-export inspect`: what a bundle or a size is made of."""

from __future__ import annotations

import shlex
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_export.cli.common_options import SIZE_NAMES, AsJson, Loras, OtherLanguageModel, OtherTokenizer, OtherVision
from flamingo_export.cli.parameter_table import Component, components

if TYPE_CHECKING:
    from rich.console import Console

    from flamingo_export.bundle.manifest import EngineRecord, EngineSummary, Manifest
    from flamingo_export.specs import SubgraphSpec, TensorSpec
    from flamingo_reference.config import ModelConfig


def inspect(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle, or a checkpoint: a folder or file.", show_default=False)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            help="Show a size instead: nano, 3b, 9b, 80b, llama-3.2-11b-vision, llama-3.2-90b-vision.",
            autocompletion=SIZE_NAMES,
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", metavar="GRAPH", help="Show the engines of a graph of the bundle, such as decoder.", show_default=False
        ),
    ] = None,
    language_model: OtherLanguageModel = None,
    vision: OtherVision = None,
    loras: Loras = None,
    tokenizer: OtherTokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Show what a bundle is made of (parameters, graphs, files, limits, how parity stands), or what building a checkpoint or size would
    produce.

    Exits with 1 for a checkpoint that cannot be built; all that is wrong with it is named.
    """
    from flamingo_export.cli.common_options import checkpoint_files, known_size
    from flamingo_export.cli.inspect_checkpoint import inspect_checkpoint, looks_like_checkpoint

    if (bundle is None) == (size is None):
        raise typer.BadParameter("give either a bundle, a checkpoint or --size", param_hint="BUNDLE")
    if engine is not None and bundle is None:
        raise typer.BadParameter("engines are part of a bundle", param_hint="--engine")
    if bundle is not None:
        _check_there(bundle)
    is_checkpoint = bundle is not None and engine is None and looks_like_checkpoint(bundle)
    if not is_checkpoint and (language_model or vision or loras or tokenizer):
        raise typer.BadParameter("parts go with a checkpoint", param_hint="BUNDLE")
    if bundle is not None and is_checkpoint:
        files = checkpoint_files(bundle, language_model, vision, loras, tokenizer)
        if not inspect_checkpoint(files, as_json):
            raise typer.Exit(1)
    elif bundle is not None and engine is not None:
        _inspect_engines(bundle, engine, as_json)
    elif bundle is not None:
        _inspect_bundle(bundle, as_json)
    elif size is not None:
        _inspect_size(known_size(size), as_json)


def _check_there(path: Path) -> None:
    """Raises BundleError where there is nothing to look at: whoever inspects wants no other bundle built in its place."""
    from flamingo_export.bundle.manifest import MANIFEST_NAME
    from flamingo_export.cli.inspect_checkpoint import looks_like_checkpoint
    from flamingo_export.errors import BundleError

    if not path.exists():
        raise BundleError(f"{path} does not exist. Give a bundle, a checkpoint (a folder or file), or --size.")
    if path.is_dir() and not (path / MANIFEST_NAME).exists() and not looks_like_checkpoint(path):
        raise BundleError(
            f"{path} is neither a bundle (it has no {MANIFEST_NAME}) nor a checkpoint (it has no config.json and no file of tensors)."
        )


def _inspect_size(config: ModelConfig, as_json: bool) -> None:
    from flamingo_export.cli.output import print_json, results

    parts = components(config)
    if as_json:
        print_json({"size": config.name, "parameters": parts, "config": config})
        return
    console = results()
    _print_components(console, f"Flamingo {config.name}", parts)
    _print_shape(console, config)


def _inspect_bundle(bundle: Path, as_json: bool) -> None:
    from rich.markup import escape

    from flamingo_export.bundle.earlier import lacking
    from flamingo_export.bundle.manifest import read_manifest
    from flamingo_export.cli.output import human_bytes, print_json, results, table

    manifest = read_manifest(bundle)
    specs, lacks = _specs(manifest), lacking(bundle, manifest)
    total = sum(file.size for file in manifest.files)
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "bytes": total,
                "parameters": components(manifest.config),
                "graphs": specs,
                "manifest": manifest,
                "lacks": lacks,
            }
        )
        return
    console = results()
    console.print(f"[bold]{escape(str(bundle))}[/bold]  {human_bytes(total)} in {len(manifest.files)} files")
    console.print(_summary(bundle, manifest))
    if lacks:
        console.print(escape(_lacks(bundle, manifest, lacks)))
    _print_components(console, f"Flamingo {manifest.config.name}", components(manifest.config))
    _print_shape(console, manifest.config)
    for record in manifest.graphs:
        spec = specs[record.name]
        rows = [("in", name, kind, shape) for name, kind, shape in _numbered_together(spec.inputs)]
        rows += [("out", name, kind, shape) for name, kind, shape in _numbered_together(spec.outputs)]
        layers = f", language model layers {record.layers[0]} to {record.layers[1] - 1}" if record.layers else ""
        console.print(table(("", "tensor", "type", "shape"), rows, title=f"{record.name}: {record.file}{layers}"))
    if manifest.engines:
        engines = [
            (engine.graph, engine.backend, engine.target, engine.tool_version, engine.file) for engine in manifest.engines
        ]
        console.print(table(("graph", "backend", "target", "version", "file"), engines, title="engines"))
    files = [(file.path, human_bytes(file.size), file.sha256[:12]) for file in manifest.files]
    console.print(table(("file", "size", "SHA-256 begins"), files, title="files", right=(1,)))
    if find_spec("polygraphy") is not None:
        from flamingo_export.validate.polygraphy_check import commands

        console.print("\nwith Polygraphy:", *commands(bundle, manifest), sep="\n  ", markup=False, soft_wrap=True)


def _inspect_engines(bundle: Path, graph: str, as_json: bool) -> None:
    """Every engine of a graph, as its builder described it."""
    from flamingo_export.bundle.manifest import read_manifest
    from flamingo_export.cli.output import print_json, results
    from flamingo_export.errors import BundleError

    manifest = read_manifest(bundle)
    # `decoder` stands for all of its parts.
    asked = {graph, *(part.name for part, _ in manifest.decoder_graphs())} if graph == "decoder" else {graph}
    found = [engine for engine in manifest.engines if engine.graph in asked]
    if not found:
        names = ", ".join(dict.fromkeys(engine.graph for engine in manifest.engines))
        raise BundleError(
            f"{bundle} has no engine of {graph!r}; it has engines of {names}."
            if names
            else f"{bundle} has no engines, only portable graphs. Build them: flamingo-export build --backend tensorrt-rtx --target sm89"
        )
    if as_json:
        print_json(found)
        return
    for engine in found:
        _print_engine(results(), engine)


def _print_engine(console: Console, engine: EngineRecord) -> None:
    from flamingo_export.cli.output import human_bytes, table

    plugin = f"plugin library {engine.plugin_sha256[:12]}..." if engine.plugin_sha256 else "no plugin library needed"
    console.print(
        f"[bold]{engine.file}[/bold]  {human_bytes(engine.size)}, SHA-256 {(engine.sha256 or 'not recorded')[:12]}\n"
        f"{engine.backend} {engine.tool_version} for {engine.target}, from {engine.lowered}, computes in {engine.compute}; {plugin}"
    )
    summary = engine.summary
    if summary is None:
        console.print("no summary was recorded\n")
        return
    rows = [
        ("layers before fusion", str(summary.layers)),
        ("kernels, all profiles", ", ".join(f"{count} {kind}" for kind, count in summary.kernels.items()) or "not reported"),
        ("fused attention", f"{summary.fused_attentions} of {summary.attentions}"),
        ("attention that knows the slots in use", str(summary.attentions_with_lengths)),
        *_quantised_row(summary),
        ("plugin layers", str(summary.plugin_layers)),
        ("cache updates in place", str(summary.cache_updates)),
        ("kernels that write", ", ".join(f"{name} {count}" for name, count in summary.output_types.items()) or "not reported"),
        ("weights", human_bytes(summary.weight_bytes)),
    ]
    console.print(table(("engine", ""), rows))
    profiles = [
        (
            profile.name,
            ", ".join(f"{symbol} {least}..{most} ({usual})" for symbol, (least, usual, most) in profile.bounds.items()),
            "not reported" if profile.activation_bytes is None else human_bytes(profile.activation_bytes),
        )
        for profile in summary.profiles
    ]
    console.print(table(("profile", "sizes, tuned for those in brackets", "intermediate results"), profiles, right=(2,)))


def _quantised_row(summary: EngineSummary) -> list[tuple[str, str]]:
    if not summary.quantised_products:
        return []
    fused = summary.quantised_products - summary.widened_products
    text = f"{fused} of {summary.quantised_products} multiplied as they are"
    if summary.widened_products:
        text += f"; not fused: {summary.widened_products}, whose weights a kernel of their own widens first"
    return [("quantised products", text)]


def _quantised_lines(manifest: Manifest) -> dict[str, str]:
    """What a policy does to this model, what it leaves though it was asked, and what that means on the CPU."""
    from flamingo_export.weights import bundle_weights

    precision = manifest.precision
    if precision.policy is None:
        return {}
    products = [weight for weight in bundle_weights(manifest.config, precision) if weight.product]
    counts: Counter[str] = Counter()
    left = []
    for weight in products:
        how, rule = weight.quantisation(precision), precision.policy.rule(weight.name)
        counts[how.element if how is not None else weight.storage(precision)] += 1
        if how is None and rule is not None and rule.format in ("fp8", "int8", "int4"):
            left.append(weight.name)
    lines = {"products": ", ".join(f"{count} in {name}" for name, count in counts.most_common())}
    if precision.media == "fp8":
        lines["media"] = "keys and values kept in FP8, a byte a number"
    if left:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        lines["unfused"] = (
            f"{len(left)} products stay in {precision.storage}, since no block of 16 or more divides their input: {shown}"
        )
    if precision.policy.needs_ranges:
        lines["on a CPU"] = "products of FP8 are computed in fp32 there, at fp32's speed and memory: for parity, not for speed"
    record = manifest.calibration
    if record is not None:
        told = {"given": "a table that was given", "shipped": "the set that ships with the package", "none": "none"}[
            record.origin
        ]
        found = (
            f" ({record.method}; {record.samples} samples, {record.tokens} tokens, {record.images} images)"
            if record.tokens
            else ""
        )
        lines["ranges"] = told + found
    return lines


def _lacks(bundle: Path, manifest: Manifest, lacks: tuple[str, ...]) -> str:
    """What an earlier version's bundle lacks, and the command that builds it again."""
    from flamingo_export.backends.tensorrt.engine_contract import rebuild_command

    engine = manifest.engines[0] if manifest.engines else None
    backend, target = (engine.backend, engine.target) if engine else ("onnxruntime", "")
    return "\n".join(
        [*(f"lacks      {each}" for each in lacks), f"           {rebuild_command(bundle, manifest, backend, target)}"]
    )


def _summary(bundle: Path, manifest: Manifest) -> str:
    precision, limits, source, parity = manifest.precision, manifest.limits, manifest.source, manifest.parity
    came = {
        "random": f"random numbers, seed {source.seed}: not a trained model",
        "checkpoint": "a checkpoint",
        "live": "a live model",
    }[source.kind]
    if source.sha256:
        came += f" (SHA-256 {source.sha256[:12]}...)"
    stands: str = f"not run: flamingo-export parity {shlex.quote(str(bundle))}" if parity.state == "not_run" else parity.state
    if parity.backends:
        stands += f" on {', '.join(parity.backends)}"
    if parity.against:
        stands += {
            "reference": " against the PyTorch reference",
            "golden": " against golden values",
            "transformers": " against transformers' own model",
        }[parity.against]
    parts = [f"{layers.start} to {layers.stop - 1}" for _, layers in manifest.decoder_graphs()]
    lines = {
        "weights": f"stored as {precision.name}, computed in {precision.compute}; from {came}",
        **_quantised_lines(manifest),
        "limits": f"{limits.max_length} cache slots, prefill by {limits.chunk}, {limits.bank_rows} media kept encoded",
        "tokens": f"a text ends after {_ids(manifest.config.tokens.stops)}; never generated: {_ids(manifest.config.tokens.never)}",
        "decoder": f"in {len(parts)} parts, language model layers {', '.join(parts)}" if len(parts) > 1 else "in one piece",
        "parity": stands,
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()) or "not recorded",
        "schema": str(manifest.schema_version),
    }
    return "\n".join(
        [*(f"{name:<10} {text}" for name, text in lines.items()), *(f"note       {note}" for note in manifest.notes)]
    )


_SHOWN_IDS = 12  # of tokens that a line names


def _ids(tokens: tuple[int, ...]) -> str:
    """The first ones of some token ids."""
    return ", ".join(map(str, tokens[:_SHOWN_IDS])) + (
        f" and {len(tokens) - _SHOWN_IDS} more" if len(tokens) > _SHOWN_IDS else ""
    )


def _print_components(console: Console, title: str, parts: list[Component]) -> None:
    from flamingo_export.cli.output import human_count, table

    if any(part.quoted for part in parts):
        rows = [
            (part.name, f"{part.parameters:,}", human_count(part.parameters), *_beside(part.parameters, part.quoted))
            for part in parts
        ]
        console.print(
            table(("component", "parameters", "", "paper quotes", "difference"), rows, title=title, right=(1, 2, 3, 4)),
            "Computed from the paper's table of shapes; its quoted counts do not all follow from that table.\n",
        )
    else:
        rows_plain = [(part.name, f"{part.parameters:,}", human_count(part.parameters)) for part in parts]
        console.print(table(("component", "parameters", ""), rows_plain, title=title, right=(1, 2)))


def _beside(count: int, quoted: float | None) -> tuple[str, str]:
    from flamingo_export.cli.output import human_count

    if quoted is None:
        return "", ""
    return human_count(quoted), f"{(count / quoted - 1) * 100:+.1f} %"


def _print_shape(console: Console, config: ModelConfig) -> None:
    vision, resampler, block, lm = config.vision, config.resampler, config.cross_attention, config.language_model
    sharing = "" if block.kv_heads == block.num_heads else f" ({block.kv_heads} of keys and values)"
    own = "" if lm.kv_heads == lm.num_heads else f" ({lm.kv_heads} of keys and values)"
    between = (
        f"a projector to {resampler.num_latents} latents of {resampler.width} a medium"
        if resampler.kind == "projector"
        else f"{resampler.num_layers} layers of {resampler.width}, {resampler.num_latents} latents, "
        f"{resampler.num_heads} heads of {resampler.head_size}"
    )
    tiles = "" if config.tiled is None else f", an image is 1 to {config.tiled.max_tiles} of them"
    more = f" ({lm.extra_embeddings} more that are only read)" if lm.extra_embeddings else ""
    console.print(
        f"vision           {vision.image_size}x{vision.image_size} pixels to {vision.num_patches} positions of {vision.feature_width}{tiles}\n"
        f"resampler        {between}\n"
        f"cross-attention  {len(config.gated_layers)} gated layers, one in {block.every}, "
        f"{block.num_heads} heads of {block.head_size}{sharing}\n"
        f"language model   {lm.num_layers} layers of {lm.width}, {lm.num_heads} heads of {lm.head_size}{own}, "
        f"vocabulary {lm.vocab_size}{more}, {lm.max_positions} positions\n"
    )


def _specs(manifest: Manifest) -> dict[str, SubgraphSpec]:
    from flamingo_export.specs import decoder_spec, subgraph_specs

    whole = subgraph_specs(manifest.config, media=manifest.precision.media)
    return {
        record.name: whole[record.name]
        if record.layers is None
        else decoder_spec(manifest.config, range(*record.layers), name=record.name, media=manifest.precision.media)
        for record in manifest.graphs
    }


def _numbered_together(tensors: tuple[TensorSpec, ...]) -> list[tuple[str, str, str]]:
    """(name, kind, shape); tensors that differ only in their number share a line: past_k.0 ... past_k.39."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for tensor in tensors:
        stem = tensor.name.split(".")[0]
        shape = "[" + ", ".join(map(str, tensor.shape)) + "]"
        grouped.setdefault((stem, tensor.kind, shape), []).append(tensor.name)
    return [
        (names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}", kind, shape)
        for (_, kind, shape), names in grouped.items()
    ]
