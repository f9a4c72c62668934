"""`.pt`, `.pth` and `.bin` files as torch writes them: found and mapped without torch, and without running what they may contain.

Since version 1.6 torch writes a zip archive whose members are stored uncompressed: `NAME/data.pkl`, a pickle that says which tensor lies
where, and `NAME/data/KEY`, the numbers. The pickle is read as data (see `pickled`), and the tensors are mapped in place, like those of a
safetensors file. Archives of scripted modules (the published CLIP ViT-L-14.pt is one) have the same two parts, and code, which is not
looked at.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from flamingo_reference.checkpoints.files.pickled import Call, MalformedPickle, Name, Persistent, read_pickle
from flamingo_reference.checkpoints.files.tensors import CheckpointError, TensorEntry

WRAPPERS = ("model_state_dict", "state_dict")
"""Keys under which training programs put the weights, beside the state of the optimizer."""
PREFIX = "module."
"""What torch's data parallel wrappers put before every name."""

_STORAGES: Mapping[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_REBUILD = (Name("torch._utils", "_rebuild_tensor_v2"), Name("torch._utils", "_rebuild_tensor"))
_OTHER_KINDS = (Name("torch._utils", "_rebuild_tensor_v3"), Name("torch._utils", "_rebuild_qtensor"))
"""How torch writes tensors of newer element types (8-bit floats, unsigned integers), and quantised ones: no weight is read of them."""
_PARAMETER = Name("torch._utils", "_rebuild_parameter")
_SCRIPTED = "__torch__"
_MAX_PICKLE = 100_000_000  # bytes, as a safetensors header
_MAX_MODULES = 100_000
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ADVICE = "Fetch the file again."
_BROKEN = (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, RuntimeError, EOFError, struct.error, zlib.error)
"""What zipfile raises for an archive that is not whole: names that are not text, unknown compression, a password, data that end early."""


class _Member(msgspec.Struct, frozen=True):
    start: int
    size: int


def open_torch_file(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a `.pt` file without reading them, the wrapping dictionary and a common `module.` prefix taken off.

    Raises CheckpointError if the file is cut short, is of the format before torch 1.6, holds anything but tensors, or asks for code to be
    run, which is never done.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start != b"PK":
            raise CheckpointError(_not_an_archive(path, start))
        with zipfile.ZipFile(path) as archive:
            return _entries(path, archive)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. {_ADVICE}") from error
    except _BROKEN as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}). {_ADVICE}") from error


def _not_an_archive(path: Path, start: bytes) -> str:
    if start[:1] == b"\x80":
        return (
            f"{path} is in the format that torch wrote before version 1.6, which cannot be read in parts. Where you trust the file, convert "
            "it once: python -c \"import torch; torch.save(torch.load('OLD.pt', map_location='cpu', weights_only=True), 'NEW.pt')\""
        )
    return f"{path} is not a file that torch wrote (it begins with {start!r}). {_ADVICE}"


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, TensorEntry]:
    infos = archive.infolist()
    pickles = [info for info in infos if info.filename.endswith("/data.pkl") and info.filename.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} has {len(pickles)} members NAME/data.pkl, expected one: it is not a file that torch wrote."
        )
    root = pickles[0].filename.removesuffix("data.pkl")
    _check_byte_order(path, archive, f"{root}byteorder")
    if pickles[0].file_size > _MAX_PICKLE:
        raise CheckpointError(
            f"{path}: its pickle has {pickles[0].file_size} bytes, expected at most {_MAX_PICKLE}: it holds no mere tensors."
        )
    try:
        value = read_pickle(archive.read(pickles[0]))
    except MalformedPickle as error:
        raise CheckpointError(f"{path} has a pickle that cannot be read: {error}. {_ADVICE}") from error
    tensors = _named_tensors(path, value)
    members = _members(path, infos, f"{root}data/")
    entries: dict[str, TensorEntry] = {}
    faults: list[str] = []
    kinds = [f"{name} has element type {kind}" for name, call in tensors.items() if (kind := _other_kind(call))]
    if kinds:
        raise CheckpointError(
            f"{path}: {'; '.join(kinds)}; expected one of {', '.join(_STORAGES)}. Bring the checkpoint as it was before it was quantised."
        )
    for name, call in tensors.items():
        placed = _placed(call, members)
        if isinstance(placed, str):
            faults.append(f"{name} {placed}")
        else:
            entries[name] = placed
    if faults:
        raise CheckpointError(f"{path} is damaged: {'; '.join(faults)}. {_ADVICE}")
    return entries


def _check_byte_order(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    if name in archive.namelist() and archive.read(name) != b"little":
        raise CheckpointError(
            f"{path} was written on a big-endian machine, which is not read. Write it again on a little-endian one."
        )


def _members(path: Path, infos: list[zipfile.ZipInfo], folder: str) -> dict[str, _Member]:
    """Where the numbers of each storage lie in the file."""
    members: dict[str, _Member] = {}
    total = path.stat().st_size
    with path.open("rb") as file:
        for info in infos:
            if not info.filename.startswith(folder):
                continue
            key = info.filename.removeprefix(folder)
            file.seek(info.header_offset)
            raw = file.read(_LOCAL_HEADER.size)
            if len(raw) < _LOCAL_HEADER.size or raw[:4] != b"PK\x03\x04" or key in members:
                raise CheckpointError(f"{path} is damaged: {info.filename} is not where the archive's index says. {_ADVICE}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: {info.filename} is compressed, which torch never does. Write the file again.")
            *_, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
            start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            if start + info.file_size > total:
                raise CheckpointError(f"{path} is cut short: {info.filename} ends beyond its {total} bytes. {_ADVICE}")
            members[key] = _Member(start, info.file_size)
    return members


def _named_tensors(path: Path, value: Any) -> dict[str, Call]:
    """The tensors by name. Raises CheckpointError for anything else."""
    if isinstance(value, Call) and value.what.module.startswith(_SCRIPTED):
        return _scripted(path, value)
    calls = sorted(set(_foreign_calls(value)))
    if calls:
        raise CheckpointError(
            f"{path} asks for code to be run when it is loaded ({', '.join(calls)}). It was not run, and such a file is not read: weights "
            "need none of it. If you trust the file, save only its tensors (torch.save(model.state_dict(), ...)) or as safetensors."
        )
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a dictionary of tensors.")
    wrappers = [wrapper for wrapper in WRAPPERS if isinstance(value.get(wrapper), dict)]
    if len(wrappers) > 1:
        raise CheckpointError(f"{path} holds weights under {' and '.join(wrappers)}. Save those that are meant by themselves.")
    value = value[wrappers[0]] if wrappers else value
    others = {name: content for name, content in value.items() if not (isinstance(name, str) and _tensor(content))}
    if others:
        found = ", ".join(f"{name!r} ({_kind(content)})" for name, content in others.items())
        raise CheckpointError(
            f"{path} holds {found} beside tensors; expected a dictionary of tensors, or one under {' or '.join(WRAPPERS)}."
        )
    if value and all(name.startswith(PREFIX) for name in value):
        return {name.removeprefix(PREFIX): content for name, content in value.items()}
    return dict(value)


def _scripted(path: Path, whole: Call) -> dict[str, Call]:
    """Tensors of a scripted module and of those within it, by the names of their attributes."""
    tensors: dict[str, Call] = {}
    pending, walked = [("", whole)], 0
    while pending:
        prefix, module = pending.pop()
        walked += 1
        if walked > _MAX_MODULES:  # a module may hold itself
            raise CheckpointError(f"{path} has more than {_MAX_MODULES} modules within each other. {_ADVICE}")
        attributes = module.state if isinstance(module.state, dict) else {}
        for name, content in attributes.items():
            if _tensor(content):
                tensors[f"{prefix}{name}"] = content
            elif isinstance(content, Call) and content.what.module.startswith(_SCRIPTED):
                pending.append((f"{prefix}{name}.", content))
    return tensors


def _tensor(content: Any) -> bool:
    return _rebuild(content) is not None


def _rebuild(content: Any) -> Call | None:
    """The call that makes a tensor from its storage, None if `content` is not a tensor or parameter."""
    if isinstance(content, Call) and content.what == _PARAMETER and content.arguments:
        content = content.arguments[0]
    return content if isinstance(content, Call) and content.what in (*_REBUILD, *_OTHER_KINDS) else None


def _other_kind(content: Call) -> str:
    """The element type of a tensor that no weight is read of, empty for one that may be."""
    call = _rebuild(content)
    if call is None:
        return ""
    if call.what == _OTHER_KINDS[0] and len(call.arguments) > 6 and isinstance(call.arguments[6], Name):
        return str(call.arguments[6])
    storage = call.arguments[0] if call.arguments else None
    identity = storage.identity if isinstance(storage, Persistent) else None
    kind = identity[1] if isinstance(identity, tuple) and len(identity) > 1 else None
    if isinstance(kind, Name) and (call.what in _OTHER_KINDS or kind.name not in _STORAGES):
        return str(kind)
    return "that is not known" if call.what in _OTHER_KINDS else ""


def _kind(content: Any) -> str:
    return str(content.what) if isinstance(content, Call) else type(content).__name__


def _foreign_calls(value: Any) -> Iterator[str]:
    """Every call within a value that does not make a tensor. Walks each object once: a pickle may refer to one from many places."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
        elif isinstance(item, Persistent):
            pending.append(item.identity)
        elif isinstance(item, Call):
            if item.what not in (*_REBUILD, *_OTHER_KINDS, _PARAMETER):
                yield str(item.what)
            pending += [*item.arguments, item.state]


def _placed(call: Call, members: Mapping[str, _Member]) -> TensorEntry | str:
    """A tensor's place in the file, or what is wrong with it."""
    arguments = rebuild.arguments if (rebuild := _rebuild(call)) is not None else ()
    storage, offset, shape, strides = arguments[:4] if len(arguments) >= 4 else (None,) * 4
    identity = storage.identity if isinstance(storage, Persistent) else None
    if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage" and isinstance(identity[1], Name)):
        return "is not a tensor with a storage"
    if len(arguments) > 6 and isinstance(arguments[6], dict) and any(arguments[6].get(bit) for bit in ("neg", "conj")):
        return "is a view that turns the numbers' signs (torch.Tensor.resolve_neg makes a tensor of it)"
    kind, key, count = identity[1], identity[2], identity[4]
    if kind.name not in _STORAGES:
        return f"has element type {kind}, expected one of {', '.join(_STORAGES)}"
    if not (_counts((offset, count)) and _counts(shape) and _counts(strides) and len(shape) == len(strides)):
        return "has an invalid shape, strides or offset"
    member = members.get(key) if isinstance(key, str) else None
    dtype = np.dtype(_STORAGES[kind.name])
    if member is None or member.size != count * dtype.itemsize:
        return f"has {0 if member is None else member.size} bytes in the file, expected {count * dtype.itemsize}"
    if 0 in shape:
        return TensorEntry(dtype, shape, member.start, 0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if offset + extent > count:
        return f"reaches to element {offset + extent} of a storage of {count}"
    start = member.start + offset * dtype.itemsize
    expected, run = [], 1
    for size in reversed(shape):
        expected.append(run)
        run *= size
    follows = all(size == 1 or stride == want for size, stride, want in zip(shape, strides, reversed(expected), strict=True))
    steps = None if follows else tuple(stride * dtype.itemsize for stride in strides)
    return TensorEntry(dtype, shape, start, extent * dtype.itemsize, steps)


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)
