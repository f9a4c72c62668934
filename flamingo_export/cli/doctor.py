"""`flamingo-export doctor`: what this machine can run, and what to install for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

if TYPE_CHECKING:
    from flamingo_export.cli.probes import Finding, Gpu, Hardware


class SizeFit(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a size can be built (disk) and run (memory, weights widened to fp32) here; sizes in bytes."""

    size: str
    bundle_bytes: int
    run_bytes: int
    disk_suffices: bool
    memory_suffices: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that `doctor` found."""

    hardware: Hardware
    gpus: list[Gpu]
    software: list[Finding]
    tasks: list[Finding]
    sizes: list[SizeFit]


def doctor(
    folder: Annotated[
        Path, typer.Option("--folder", help="Where bundles will be written: its disk is the one looked at.")
    ] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine can run (processor, memory, disk, ONNX Runtime, PyTorch, CUDA, TensorRT) and what to install for the rest."""
    from flamingo_export.cli.output import print_json

    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder", param_hint="--folder")
    report = examine(folder)
    if as_json:
        print_json(report)
    else:
        _print(report)


def examine(folder: Path) -> Report:
    """Looks at the machine, with the disk that `folder` is on."""
    from flamingo_export.cli import probes

    found = probes.hardware(folder)
    driver, gpus = probes.cuda()
    runtime, torch = probes.onnxruntime(), probes.torch()
    extras = [_optional("scikit-learn", "training nano")]
    tensorrt = probes.tensorrt()
    software = [runtime, probes.packages(), torch, *extras, driver, *tensorrt]
    return Report(
        hardware=found, gpus=gpus, software=software, tasks=_tasks(runtime, torch, tensorrt, gpus), sizes=_sizes(found)
    )


def _optional(name: str, purpose: str) -> Finding:
    from flamingo_export.cli import probes

    installed = probes.package(name)
    return probes.Finding(
        name=name,
        found=installed is not None,
        detail=f"{installed or 'not installed'} ({purpose})",
        remedy=None if installed else f"pip install {name}",
    )


def _tasks(runtime: Finding, torch: Finding, tensorrt: list[Finding], gpus: list[Gpu]) -> list[Finding]:
    from flamingo_export.backends.onnxruntime_library import lowest
    from flamingo_export.cli.probes import Finding
    from flamingo_export.errors import pip_install

    works, needs_torch, needs_runtime = "works here", "needs PyTorch", f"needs ONNX Runtime, {lowest()} or later"
    cuda_provider = runtime.found and "CUDA" in runtime.detail
    on_gpu = gpus and cuda_provider
    return [
        Finding(
            name="build, generate, score, bench on the CPU",
            found=runtime.found,
            detail=works if runtime.found else needs_runtime,
            remedy=runtime.remedy,
        ),
        Finding(name="parity against golden values", found=runtime.found, detail=works if runtime.found else needs_runtime),
        Finding(
            name="parity against the PyTorch reference",
            found=torch.found,
            detail=works if torch.found else needs_torch,
            remedy=torch.remedy,
        ),
        Finding(
            name="build from a live PyTorch model",
            found=torch.found,
            detail=works if torch.found else needs_torch,
            remedy=torch.remedy,
        ),
        Finding(
            name="generate on a GPU through ONNX Runtime",
            found=bool(on_gpu),
            detail="CUDA provider and GPU are there (not tested by this project so far)"
            if on_gpu
            else ("no GPU found" if not gpus else "this ONNX Runtime has no CUDA provider"),
            remedy=f"pip uninstall onnxruntime; {pip_install('gpu')}" if gpus and not cuda_provider else None,
        ),
        *_engine_tasks(tensorrt, gpus),
    ]


def _engine_tasks(tensorrt: list[Finding], gpus: list[Gpu]) -> list[Finding]:
    from flamingo_export.cli.probes import DATACENTER, PLUGIN, RTX, Finding

    by_name = {finding.name: finding for finding in tensorrt}
    rtx, datacenter, plugin = by_name[RTX], by_name[DATACENTER], by_name[PLUGIN]
    lacking = [
        what
        for what, there in (("TensorRT", datacenter.found), ("a GPU", bool(gpus)), ("the plugin", plugin.found))
        if not there
    ]
    return [
        Finding(
            name="build engines for RTX GPUs (--backend tensorrt-rtx)",
            found=rtx.found,
            detail="works here, for any target" if rtx.found else "needs TensorRT for RTX, no GPU",
            remedy=rtx.remedy,
        ),
        Finding(
            name="build engines for this GPU (--backend tensorrt)",
            found=not lacking,
            detail=f"needs {', '.join(lacking)}" if lacking else "everything is there (not tested by this project so far)",
            remedy=next((each.remedy for each in (datacenter, plugin) if not each.found), None),
        ),
        *_running(),
    ]


def _running() -> list[Finding]:
    """Whether engines of a bundle run here: the backends know."""
    from flamingo_export.backends.registry import COMPILERS, get_compiler
    from flamingo_export.cli.probes import Finding

    states = {name: get_compiler(name).availability() for name in COMPILERS}
    return [
        Finding(
            name=f"run engines (--backend {name})",
            found=state.usable,
            detail=f"{state.detail} (not tested by this project so far)" if state.usable else state.detail,
            remedy=state.remedy,
        )
        for name, state in states.items()
    ]


def _sizes(found: Hardware) -> list[SizeFit]:
    from flamingo_export import estimates
    from flamingo_export.precision import default_precision
    from flamingo_export.weights import WeightIndex
    from flamingo_reference.config import SIZES
    from flamingo_reference.names import parameter_counts

    fits = []
    for name, config in SIZES.items():
        index = WeightIndex.planned(config, default_precision(sum(parameter_counts(config).values())))
        stored, running = sum(index.sizes().values()), estimates.resident(config, index)
        fits.append(
            SizeFit(
                size=name,
                bundle_bytes=stored,
                run_bytes=running,
                disk_suffices=stored < found.disk_free,
                memory_suffices=running < found.memory_available,
            )
        )
    return fits


def _print(report: Report) -> None:
    from rich.markup import escape

    from flamingo_export.cli.output import human_bytes, results, table

    console, found = results(), report.hardware
    extensions = ", ".join(found.vector_extensions) or "vector extensions unknown"
    console.print(
        f"[bold]{escape(found.processor)}[/bold], {found.cores} cores ({extensions})\n"
        f"{human_bytes(found.memory)} memory, {human_bytes(found.memory_available)} of it available; "
        f"{human_bytes(found.disk_free)} free at {escape(found.disk_folder)}\n"
        f"{found.system}, Python {found.python}"
    )
    for gpu in report.gpus:
        console.print(f"{gpu.name}, {human_bytes(gpu.memory)}, compute capability {gpu.compute_capability}")
    for title, findings in (("Software", report.software), ("What runs here", report.tasks)):
        rows = [("yes" if each.found else "no", each.name, each.detail, each.remedy or "") for each in findings]
        console.print(table(("", title, "found", "to get it"), rows))
    sizes = [
        (
            fit.size,
            human_bytes(fit.bundle_bytes),
            "fits" if fit.disk_suffices else "too little disk",
            human_bytes(fit.run_bytes),
            "fits" if fit.memory_suffices else "too little memory",
        )
        for fit in report.sizes
    ]
    console.print(table(("size", "bundle", "on this disk", "to run, about", "in this memory"), sizes, right=(1, 3)))
