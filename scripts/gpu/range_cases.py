"""The kernels of ranges of media on a GPU against the fp64 oracle, by the rule of `kernel_cases`: tiles of images, heads that share keys, keys
that are split over blocks and joined."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.kernel_cases import FP8, HEAD_SIZES, TYPES, within_rule
from gpu.kernel_library import DTYPES, CudaFailed

KEYS = (16, 64, 100, 1601)
"""Of a medium: less than a slice of 64, one, one and a part, and those of a tile of Llama 3.2 Vision, which are split."""
LAYOUTS = (
    "images of tiles",
    "side by side",
    "one tile",
    "ragged",
    "no medium",
    "out of range",
    "shuffled rows",
    "step",
    "beams",
    "17 queries",
    "empty bank",
)


class RangeArgs(ctypes.Structure):
    """flamingo_phi_range_cross_attention_args of phi_range_cross_attention.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "media_rows", "first_media", "phi", "k_scale", "v_scale", "y", "workspace")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "positions", "heads", "kv_heads", "head_size", "keys", "media", "bank_rows")
        ),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int),
        ("kv_dtype", ctypes.c_int),
    )


class RangeKernels:
    """The kernels of ranges in libflamingo_kernels.so."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._launch = library.flamingo_phi_range_cross_attention
        self._launch.argtypes, self._launch.restype = [ctypes.POINTER(RangeArgs), ctypes.c_void_p], ctypes.c_int
        self._name = library.flamingo_phi_range_cross_attention_kernel
        self._name.argtypes, self._name.restype = [ctypes.POINTER(RangeArgs)], ctypes.c_char_p
        self._workspace = library.flamingo_phi_range_cross_attention_workspace
        self._workspace.argtypes, self._workspace.restype = [ctypes.POINTER(RangeArgs)], ctypes.c_size_t

    def launch(self, args: RangeArgs, stream: int = 0) -> None:
        """Enqueues the computation. Raises CudaFailed."""
        code = int(self._launch(ctypes.byref(args), stream))
        if code:
            raise CudaFailed(code)

    def name(self, args: RangeArgs) -> str | None:
        """Which kernel would be chosen, None where the arguments are refused."""
        found: bytes | None = self._name(ctypes.byref(args))
        return found.decode() if found is not None else None

    def workspace(self, args: RangeArgs) -> int:
        """Bytes that a call wants."""
        return int(self._workspace(ctypes.byref(args)))


@dataclass(frozen=True)
class Case:
    layout: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_size: int
    keys: int

    def __str__(self) -> str:
        names = f"{self.dtype}, {self.kv_dtype}".replace("torch.", "")
        return f"range, {self.layout}; {names}; head size {self.head_size}, {self.keys} keys"


@dataclass
class Inputs:
    """q [B,S,H,D]; k, v [N,Hk,R,D]; media_rows [B,M]; first_media, phi [B,S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    media_rows: Tensor
    first_media: Tensor
    phi: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in vars(self).values() if t is not None)


def all_cases() -> Iterator[Case]:
    for layout, (dtype, kv_dtype), head_size, keys in itertools.product(LAYOUTS, TYPES, HEAD_SIZES, KEYS):
        yield Case(layout, dtype, kv_dtype, head_size, keys)


def few_cases() -> Iterator[Case]:
    """One of each kernel and type: what compute-sanitizer has time for."""
    for (dtype, kv_dtype), (layout, keys) in itertools.product(TYPES, (("ragged", 100), ("beams", 64), ("step", 700))):
        yield Case(layout, dtype, kv_dtype, 80, keys)


def arguments(inputs: Inputs, y: Tensor, workspace: Tensor | None = None) -> RangeArgs:
    """The tensors must outlive the call."""
    given = (inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.first_media, inputs.phi)
    if not all(tensor.is_contiguous() for tensor in (*given, y)):
        raise ValueError("tensors must be contiguous")
    batch, positions, heads, head_size = inputs.q.shape
    rows, kv_heads, keys, _ = inputs.k.shape
    addresses = (t.data_ptr() if t is not None else None for t in (*given, inputs.k_scale, inputs.v_scale, y, workspace))
    return RangeArgs(
        *addresses, batch, positions, heads, kv_heads, head_size, keys, inputs.media_rows.shape[1], rows,
        head_size**-0.5, DTYPES[inputs.q.dtype], DTYPES[inputs.k.dtype],
    )  # fmt: skip


def rows_seen(inputs: Inputs) -> list[list[list[int]]]:
    """Bank rows of each position of each request, in order; none where its range is out of range. Rows out of range are left out."""
    found = []
    for rows, firsts, lasts in zip(inputs.media_rows.tolist(), inputs.first_media.tolist(), inputs.phi.tolist(), strict=True):
        inside = [first >= 1 and 1 <= last <= len(rows) for first, last in zip(firsts, lasts, strict=True)]
        found.append([
            [row for row in rows[first - 1 : last] if 0 <= row < inputs.k.shape[0]] if good else []
            for first, last, good in zip(firsts, lasts, inside, strict=True)
        ])  # fmt: skip
    return found


def make(case: Case, generator: torch.Generator, device: str = "cuda") -> Inputs:
    """Random inputs; rows of the bank that no request reads from are NaN, as are queries without a medium."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    # Requests, positions, images of each, tiles of an image, rows of the bank.
    batch, positions, images, tiles, rows = {
        "images of tiles": (1, 300, 4, 4, 16), "side by side": (2, 90, 3, 2, 6), "one tile": (2, 130, 1, 1, 2),
        "ragged": (3, 77, 3, 3, 12), "no medium": (2, 65, 2, 2, 4), "out of range": (2, 90, 3, 2, 7), "shuffled rows": (2, 64, 4, 2, 20),
        "step": (1, 1, 2, 4, 8), "beams": (4, 3, 2, 4, 12), "17 queries": (1, 17, 2, 2, 4), "empty bank": (2, 20, 0, 1, 0),
    }[case.layout]  # fmt: skip
    media = images * tiles
    kv_heads, heads = 2, 2 if case.layout == "17 queries" else 4
    media_rows = integers(0, max(rows, 1), batch, media)
    ends = torch.stack([_seen(positions, images, generator) for _ in range(batch)]) * tiles
    first = (ends - tiles + 1).clamp(min=0)
    if case.layout == "images of tiles":
        media_rows = torch.randperm(rows, generator=generator)[None]
    elif case.layout == "side by side":  # all images so far
        first = (ends > 0).long()
    elif case.layout == "no medium":
        ends = first = torch.zeros_like(ends)
    elif case.layout == "out of range":
        first, ends = integers(-2, media + 2, batch, positions), integers(-2, media + 3, batch, positions)
        media_rows[0, 0], media_rows[1, 1] = -1, rows
    elif case.layout in ("one tile", "step", "beams"):
        ends = torch.full_like(ends, media)
        first = ends - tiles + 1
    q = draw(batch, positions, heads, case.head_size)
    k, v = (draw(rows, kv_heads, case.keys, case.head_size) for _ in range(2))
    scales = [torch.tensor(s, device=device) if case.kv_dtype == FP8 else None for s in (0.75, 1.5)]
    inputs = Inputs(q, k, v, media_rows, first, ends, *scales)
    read = torch.zeros(rows, dtype=torch.bool)
    for request, seen in enumerate(rows_seen(inputs)):
        q[request, [place for place, found in enumerate(seen) if not found]] = torch.nan
        # What lies between the ranges of neighbouring positions may be read and left out.
        good = (first[request] >= 1) & (ends[request] >= 1) & (ends[request] <= media) & (first[request] <= ends[request])
        if bool(good.any()):
            between = media_rows[request, int(first[request][good].min()) - 1 : int(ends[request][good].max())]
            read[between[(between >= 0) & (between < rows)]] = True
    k[~read] = v[~read] = torch.nan
    return Inputs(
        q.to(device, case.dtype), k.to(device, case.kv_dtype), v.to(device, case.kv_dtype),
        media_rows.to(device), first.to(device), ends.to(device), *scales,
    )  # fmt: skip


def _seen(positions: int, images: int, generator: torch.Generator) -> Tensor:
    """Images so far at each position of a prompt."""
    starts = torch.randperm(positions, generator=generator)[:images]
    return torch.zeros(positions, dtype=torch.int64).scatter_(0, starts, 1).cumsum(0)


def attend(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The definition: [B,S,H,D] in `dtype`, keys of a range side by side, everything computed in it."""
    y = torch.zeros(inputs.q.shape, dtype=dtype, device=inputs.q.device)
    group = inputs.q.shape[2] // inputs.k.shape[1]
    scales = (float(scale) if scale is not None else 1.0 for scale in (inputs.k_scale, inputs.v_scale))
    banks = [(bank.float().double() * scale).to(dtype) for bank, scale in zip((inputs.k, inputs.v), scales, strict=True)]
    for request, seen in enumerate(rows_seen(inputs)):
        places: dict[tuple[int, ...], list[int]] = {}
        for place, rows in enumerate(seen):
            if rows:
                places.setdefault(tuple(rows), []).append(place)
        for together, here in places.items():
            queries = inputs.q[request, here].to(dtype).transpose(0, 1)  # [H, n, D]
            keys, values = (
                bank[list(together)].transpose(0, 1).flatten(1, 2).repeat_interleave(group, dim=0) for bank in banks
            )  # [H, m * R, D]
            if dtype == torch.float64:
                shares = (queries @ keys.transpose(1, 2) * inputs.q.shape[-1] ** -0.5).softmax(-1)
                found = shares @ values
            else:
                found = F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
            y[request, here] = found.transpose(0, 1)
    return y


def compare(inputs: Inputs, y: Tensor) -> dict[str, float]:
    """Errors of y in units of the allowance. Raises AssertionError."""
    empty = torch.tensor([[not rows for rows in request] for request in rows_seen(inputs)], device=y.device)
    return within_rule(y, empty, attend(inputs, torch.float64), attend(inputs, inputs.q.dtype))


def launch(kernels: RangeKernels, inputs: Inputs, y: Tensor, stream: int = 0) -> tuple[str | None, Tensor | None]:
    """Enqueues a case; returns the kernel's name and its workspace, which must outlive the call."""
    bare = arguments(inputs, y)
    size = kernels.workspace(bare)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=y.device) if size else None
    args = arguments(inputs, y, workspace)
    kernels.launch(args, stream)
    return kernels.name(args), workspace


def check(kernels: RangeKernels, cases: Iterator[Case], seed: int, device: str = "cuda") -> dict[str, Any]:
    """Runs the cases. Returns their number, the worst share of the allowance by kernel, and the failures."""
    generator = torch.Generator().manual_seed(seed)
    worst: dict[str, float] = {}
    failures, count = [], 0
    for case in cases:
        inputs = make(case, generator, device)
        y = torch.full_like(inputs.q, torch.nan)
        count += 1
        try:
            name, _ = launch(kernels, inputs, y, _stream(device))
            _wait(device)
            shares = compare(inputs, y)
        except AssertionError as error:
            failures.append(f"{case}: {error}")
            continue
        worst[str(name)] = max(worst.get(str(name), 0.0), *shares.values())
    return {"cases": count, "worst_share_of_allowance": worst, "failures": failures}


def check_graph_replay(kernels: RangeKernels, seed: int) -> dict[str, Any]:
    """A call captured once gives the results of whatever its tensors hold when it is replayed: both kernels, where keys are split."""
    generator = torch.Generator().manual_seed(seed)
    failures, count = [], 0
    for (dtype, kv_dtype), layout in itertools.product(TYPES, ("shuffled rows", "beams", "step")):
        case = Case(layout, dtype, kv_dtype, 64, 700)
        held = make(case, generator)
        y = torch.full_like(held.q, torch.nan)
        _, workspace = launch(kernels, held, y, _stream("cuda"))  # the first call loads the module, which a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        args = arguments(held, y, workspace)
        with torch.cuda.graph(graph):
            kernels.launch(args, _stream("cuda"))
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


def check_shapes(kernels: RangeKernels, seed: int) -> dict[str, Any]:
    """Shapes and types are taken or refused by what can be known without a GPU: one of each type and head size, and one that is wrong."""
    generator = torch.Generator().manual_seed(seed)
    failures, count = [], 0
    for (dtype, kv_dtype), head_size in itertools.product(TYPES, (*HEAD_SIZES, 72)):
        case = Case("ragged", dtype, kv_dtype, head_size, 64)
        inputs = make(case, generator, device="cpu")
        y = torch.empty_like(inputs.q)
        size = kernels.workspace(arguments(inputs, y))
        name = kernels.name(arguments(inputs, y, torch.empty(max(size, 16), dtype=torch.uint8)))
        count += 1
        if (name is not None) != (head_size in HEAD_SIZES):
            failures.append(f"{case}: {name}")
    return {"cases": count, "failures": failures}


def check_refusals(kernels: RangeKernels, device: str = "cuda") -> dict[str, Any]:
    """Arguments that the kernels do not take come back as cudaErrorInvalidValue and leave the device usable."""
    inputs = make(Case("step", torch.float16, torch.float16, 64, 1601), torch.Generator().manual_seed(0), device)
    y = torch.empty_like(inputs.q)
    size = kernels.workspace(arguments(inputs, y))
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    wrong: tuple[tuple[str, Any], ...] = (
        ("head_size", 72),
        ("keys", 0),
        ("kv_heads", 3),
        ("kv_dtype", 2),
        ("q", inputs.q.data_ptr() + 2),
        ("k_scale", y.data_ptr()),
        ("first_media", None),
        ("workspace", None),
    )
    failures = [] if size else ["a step over 8 tiles of 1601 keys wants no workspace"]
    for field, value in wrong:
        args = arguments(inputs, y, workspace)
        setattr(args, field, value)
        try:
            kernels.launch(args, _stream(device))
            failures.append(f"{field} = {value} was taken")
        except CudaFailed as error:
            if error.code != 1 or kernels.name(args) is not None:
                failures.append(f"{field} = {value}: {error}")
    _wait(device)
    return {"cases": len(wrong), "failures": failures}


def _stream(device: str) -> int:
    return int(torch.cuda.current_stream().cuda_stream) if device == "cuda" else 0


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
