"""The kernels on a GPU against the fp64 oracle.

The rule: the greatest and the root-mean-square error are at most twice what torch has computing the same in the same dtype, plus a floor of
one rounding unit of the dtype (4e-6 in fp32, whose torch error can be far below what any order of summation gives), times the greatest result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu import kernel_oracle
from gpu.kernel_library import Kernels, arguments

FLOOR = {torch.float32: 4e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FP8 = torch.float8_e4m3fn
TYPES = (
    (torch.float32, torch.float32), (torch.float32, FP8), (torch.float16, torch.float16),
    (torch.float16, FP8), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, FP8),
)  # fmt: skip
HEAD_SIZES = (32, 64, 80, 96, 128)
LATENTS = (16, 64, 100, 128)
LAYOUTS = (
    "prompt of 32 images",
    "one image",
    "ragged",
    "no medium",
    "out of range",
    "shuffled rows",
    "beams",
    "17 positions",
    "empty bank",
)


@dataclass(frozen=True)
class Case:
    layout: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_size: int
    latents: int

    def __str__(self) -> str:
        names = f"{self.dtype}, {self.kv_dtype}".replace("torch.", "")
        return f"{self.layout}; {names}; head size {self.head_size}, {self.latents} latents"


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    media_rows: Tensor
    phi: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in vars(self).values() if t is not None)


def all_cases() -> Iterator[Case]:
    for layout, (dtype, kv_dtype), head_size, latents in itertools.product(LAYOUTS, TYPES, HEAD_SIZES, LATENTS):
        yield Case(layout, dtype, kv_dtype, head_size, latents)


def few_cases() -> Iterator[Case]:
    """One of each kernel and type: what compute-sanitizer has time for."""
    for (dtype, kv_dtype), (layout, latents) in itertools.product(TYPES, (("ragged", 64), ("ragged", 100), ("beams", 64))):
        yield Case(layout, dtype, kv_dtype, 80, latents)


def sentence(positions: int, media: int, generator: torch.Generator) -> Tensor:
    """phi of a prompt: `media` images at drawn places, some text before the first."""
    starts = torch.randperm(positions, generator=generator)[:media]
    return torch.zeros(positions, dtype=torch.int64).scatter_(0, starts, 1).cumsum(0)


def make(case: Case, generator: torch.Generator, device: str = "cuda") -> Inputs:
    """Random inputs; what no position may read is NaN: other rows of the bank, queries without a medium."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    heads = 3
    batch, positions, media, rows = {
        "prompt of 32 images": (1, 600, 32, 32), "one image": (2, 130, 1, 2), "ragged": (3, 77, 5, 9), "no medium": (2, 65, 2, 2),
        "out of range": (2, 90, 3, 4), "shuffled rows": (2, 128, 8, 16), "beams": (5, 3, 32, 40), "17 positions": (1, 17, 2, 2),
        "empty bank": (2, 20, 0, 0),
    }[case.layout]  # fmt: skip
    media_rows = integers(0, max(rows, 1), batch, media)
    phi = torch.stack([sentence(positions, media, generator) for _ in range(batch)])
    if case.layout == "prompt of 32 images":
        media_rows = torch.randperm(rows, generator=generator)[None]
    elif case.layout == "one image":
        phi = torch.ones_like(phi)
    elif case.layout == "no medium":
        phi = torch.zeros_like(phi)
    elif case.layout == "out of range":
        phi = integers(-2, media + 3, batch, positions)
        media_rows[0, 0], media_rows[1, 1] = -1, rows
    elif case.layout == "shuffled rows":
        phi = integers(0, media + 1, batch, positions)
    elif case.layout == "beams":
        phi = torch.full((batch, positions), media)
    q, k, v = (
        draw(batch, positions, heads, case.head_size),
        *(draw(rows, heads, case.latents, case.head_size) for _ in range(2)),
    )
    seen = kernel_oracle.rows_seen(media_rows, phi, rows)
    q[seen < 0] = torch.nan
    unread = torch.ones(rows, dtype=torch.bool)
    unread[seen[seen >= 0]] = False
    k[unread] = v[unread] = torch.nan
    scales = [torch.tensor(s, device=device) if case.kv_dtype == FP8 else None for s in (0.75, 1.5)]
    return Inputs(
        q.to(device, case.dtype),
        k.to(device, case.kv_dtype),
        v.to(device, case.kv_dtype),
        media_rows.to(device),
        phi.to(device),
        *scales,
    )


def launch(kernels: Kernels, inputs: Inputs, y: Tensor) -> str | None:
    args = arguments(
        inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi, y, k_scale=inputs.k_scale, v_scale=inputs.v_scale
    )
    kernels(args)
    return kernels.name(args)


def compare(inputs: Inputs, y: Tensor) -> dict[str, float]:
    """Errors of y and of torch in the same dtype, each in units of the allowance. Raises AssertionError."""
    k_scale, v_scale = (float(scale) if scale is not None else 1.0 for scale in (inputs.k_scale, inputs.v_scale))
    tensors = (inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi)
    right, usual = (
        kernel_oracle.attend(*tensors, dtype=t, k_scale=k_scale, v_scale=v_scale) for t in (torch.float64, inputs.q.dtype)
    )
    return within_rule(y, kernel_oracle.rows_seen(inputs.media_rows, inputs.phi, inputs.k.shape[0]) < 0, right, usual)


def within_rule(y: Tensor, empty: Tensor, right: Tensor, usual: Tensor) -> dict[str, float]:
    """Errors of y in units of the allowance. empty: positions that see no medium; right: in fp64; usual: torch's in y's dtype.

    Raises AssertionError.
    """
    dtype = y.dtype
    assert bool((y[empty] == 0).all()), "a position without a medium is not exactly zero"
    assert bool(y.isfinite().all()), "a result is not finite, or was never written"
    floor = FLOOR[dtype] * float(right.abs().amax()) if right.numel() else 0.0
    shares = {}
    norms: dict[str, Callable[[Tensor], float]] = {
        "greatest": lambda x: float(x.abs().amax()),
        "rms": lambda x: float(x.square().mean().sqrt()),
    }
    for name, norm in norms.items():
        error, torch_error = norm(y.double() - right), norm(usual.double() - right)
        allowed = 2 * torch_error + floor
        assert error <= allowed, (
            f"{name} error {error:.3g} against fp64; torch in {dtype} has {torch_error:.3g}, allowed is {allowed:.3g}"
        )
        shares[name] = error / allowed if allowed else 0.0
    return shares


def check(kernels: Kernels, cases: Iterator[Case], seed: int) -> dict[str, Any]:
    """Runs the cases. Returns their number, the worst share of the allowance by kernel, and the failures."""
    generator = torch.Generator().manual_seed(seed)
    worst: dict[str, float] = {}
    failures, count = [], 0
    for case in cases:
        inputs = make(case, generator)
        y = torch.full_like(inputs.q, torch.nan)
        count += 1
        try:
            name = launch(kernels, inputs, y)
            torch.cuda.synchronize()
            shares = compare(inputs, y)
        except AssertionError as error:
            failures.append(f"{case}: {error}")
            continue
        worst[str(name)] = max(worst.get(str(name), 0.0), *shares.values())
    return {"cases": count, "worst_share_of_allowance": worst, "failures": failures}


def check_graph_replay(kernels: Kernels, seed: int) -> dict[str, Any]:
    """A call captured once gives the results of whatever its tensors hold when it is replayed."""
    generator = torch.Generator().manual_seed(seed)
    failures, count = [], 0
    for (dtype, kv_dtype), layout in itertools.product(TYPES, ("shuffled rows", "beams")):
        case = Case(layout, dtype, kv_dtype, 64, 64)
        held = make(case, generator)
        y = torch.full_like(held.q, torch.nan)
        launch(kernels, held, y)  # the first call loads the module, which a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(kernels, held, y)
        for _ in range(3):
            for there, fresh in zip(held.tensors(), make(case, generator).tensors(), strict=True):
                there.copy_(fresh)
            y.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            count += 1
            try:
                compare(held, y)
            except AssertionError as error:
                failures.append(f"replayed {case}: {error}")
    return {"cases": count, "failures": failures}


def check_shapes(kernels: Kernels, seed: int) -> dict[str, Any]:
    """Shapes and types are taken or refused by what can be known without a GPU: one of each type and head size, and some that are wrong."""
    generator = torch.Generator().manual_seed(seed)
    failures, count = [], 0
    for (dtype, kv_dtype), head_size in itertools.product(TYPES, (*HEAD_SIZES, 72)):
        case = Case("ragged", dtype, kv_dtype, head_size, 64)
        inputs = make(case, generator, device="cpu")
        given = (inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi)
        args = arguments(*given, torch.empty_like(inputs.q), k_scale=inputs.k_scale, v_scale=inputs.v_scale)
        count += 1
        if (kernels.name(args) is not None) != (head_size in HEAD_SIZES):
            failures.append(f"{case}: {kernels.name(args)}")
    return {"cases": count, "failures": failures}


def check_refusals(kernels: Kernels) -> dict[str, Any]:
    """Arguments that the kernels do not take come back as cudaErrorInvalidValue and leave the device usable."""
    from gpu.kernel_library import CudaFailed

    inputs = make(Case("ragged", torch.float16, torch.float16, 64, 64), torch.Generator().manual_seed(0))
    y = torch.empty_like(inputs.q)
    failures = []
    for field, value in (
        ("head_size", 72),
        ("latents", 0),
        ("kv_dtype", 2),
        ("q", inputs.q.data_ptr() + 2),
        ("k_scale", y.data_ptr()),
    ):
        args = arguments(inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi, y)
        setattr(args, field, value)
        try:
            kernels(args)
            failures.append(f"{field} = {value} was taken")
        except CudaFailed as error:
            if error.code != 1 or kernels.name(args) is not None:
                failures.append(f"{field} = {value}: {error}")
    torch.cuda.synchronize()
    return {"cases": 5, "failures": failures}
