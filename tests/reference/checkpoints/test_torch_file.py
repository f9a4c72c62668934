"""`.pt` files: what torch writes is found as torch reads it, and nothing in a file is ever run."""

from __future__ import annotations

import collections
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.pickled import Call, MalformedPickle, Name, read_pickle
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.model import numpy_from_torch

Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    """Every element type, a scalar, an empty tensor, one of another memory order, and two that share a storage."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(6, 5, generator=generator)
    floats = {str(kind): base.to(kind) for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    whole = {str(kind): (9 * base).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.bool)}
    return {
        **floats,
        **whole,
        "bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": base.t(),
        "slice": base[1:4, ::2],
        "tied": base,
        "parameter": nn.Parameter(base[2]),
    }


def check(path: Path, expected: Tensors) -> None:
    reader = open_tensors(path)
    assert reader.names() == list(expected)
    for name, tensor in expected.items():
        array = reader.read(name)
        wanted = numpy_from_torch(tensor.detach().contiguous()) if tensor.is_floating_point() else tensor.numpy()
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), wanted.dtype), name
        assert array.tobytes() == wanted.tobytes(), name
        assert not array.flags.writeable or array.size == 0


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_torch_saves_is_read_bit_for_bit(tmp_path: Path, protocol: int) -> None:
    torch.save(tensors(), tmp_path / "a.pt", pickle_protocol=protocol)
    check(tmp_path / "a.pt", tensors())


def test_state_dicts_of_modules(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "a.bin")
    check(tmp_path / "a.bin", dict(module.state_dict()))


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    """As training programs save them: an epoch and the optimizer's state beside the weights."""
    plain: Any = collections.OrderedDict({f"{prefix}{name}": tensor for name, tensor in tensors().items()})
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    content = plain if wrapper is None else {"epoch": 3, wrapper: plain, "optimizer_state_dict": optimizer.state_dict()}
    torch.save(content, tmp_path / "a.pt")
    check(tmp_path / "a.pt", tensors())


def test_a_view_that_turns_signs(tmp_path: Path) -> None:
    """torch saves the numbers as they were and that they are to be turned."""
    torch.save({"a": torch._neg_view(torch.ones(2, 3))}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].sum() == -6
    with pytest.raises(CheckpointError, match=r"a is a view that turns the numbers' signs"):
        open_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "uint16", "qint8", "complex64"])
@pytest.mark.parametrize("parameter", [False, True])
def test_element_types_that_no_weight_is_read_of(tmp_path: Path, kind: str, parameter: bool) -> None:
    """torch writes the first three and quantised ones by calls of their own, which ask for no code of the file's."""
    if kind == "qint8":
        with warnings.catch_warnings(action="ignore"):
            tensor, said = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "torch.QInt8Storage"
    else:
        tensor = torch.zeros(3).to(getattr(torch, kind))
        said = "torch.ComplexFloatStorage" if kind == "complex64" else f"torch.{kind}"
    content = nn.Parameter(tensor, requires_grad=False) if parameter else tensor
    torch.save({"a": content, "b": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: a has element type {said}; expected one of .* before it was quantised"):
        open_tensors(tmp_path / "a.pt")


def test_weights_under_two_wrappers(tmp_path: Path) -> None:
    torch.save({"model_state_dict": tensors(), "state_dict": tensors()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds weights under model_state_dict and state_dict\. Save those that"):
        open_tensors(tmp_path / "a.pt")


def test_an_archive_by_any_name(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "last.ckpt")
    check(tmp_path / "last.ckpt", tensors())


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(2)}, tmp_path / "a.pt")
    assert open_tensors(tmp_path / "a.pt").names() == ["module.a", "b"]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2).half()
        self.register_buffer("table", torch.arange(4.0))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.scale


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Inner()
        self.blocks = nn.Sequential(Inner(), Inner())
        self.width = 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


def test_scripted_modules_as_clip_is_published(tmp_path: Path) -> None:
    module = Outer()
    torch.jit.script(module).save(str(tmp_path / "ViT-L-14.pt"))
    reader = open_tensors(tmp_path / "ViT-L-14.pt")
    expected = module.state_dict()
    assert sorted(reader.names()) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(reader.read(name), numpy_from_torch(tensor))


# What is refused.


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("place", ["among the tensors", "in the optimizer", "as a key", "as the whole"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_and_never_run(tmp_path: Path, place: str, protocol: int) -> None:
    attack: Any = Attack(tmp_path / "run")
    content: Any = {
        "among the tensors": {"a": torch.zeros(2), "b": attack},
        "in the optimizer": {"model_state_dict": {"a": torch.zeros(2)}, "optimizer": [{"x": (1, attack)}]},
        "as a key": {"a": torch.zeros(2), "b": {attack: 1}},
        "as the whole": attack,
    }[place]
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
    with pytest.raises(
        CheckpointError, match=r"a\.pt asks for code to be run when it is loaded \((posix|nt)\.system\). It was not run"
    ):
        open_tensors(tmp_path / "a.pt")
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the file is what it claims to be
    assert (tmp_path / "run").exists()


def test_all_calls_are_named(tmp_path: Path) -> None:
    torch.save({"a": Attack(tmp_path), "b": [complex(1, 2)], "c": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"__builtin__\.complex, (posix|nt)\.system"):
        open_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("program", [b"cos\nsystem\n(S'x'\ntR.", b"(S'x'\nios\nsystem\n.", b"(cos\nsystem\nS'x'\no."])
def test_old_ways_to_call_are_inert_too(program: bytes) -> None:
    value = read_pickle(program)
    assert isinstance(value, Call)
    assert (value.what, value.arguments) == (Name("os", "system"), ("x",))


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"}",
        b"garbage",
        b"cos\nsystem\n(S'x'\nt",
        b"N)R.",
        b"}N}b" + b"b.",
        b"h\x05.",
        b"]K\x01s.",
        b"\x82\x01.",
        b"t.",
    ],
)
def test_malformed_pickles(program: bytes) -> None:
    with pytest.raises(MalformedPickle):
        read_pickle(program)


def test_all_keys_that_are_given_twice_are_named() -> None:
    with pytest.raises(MalformedPickle, match="it gives 'a', 'b' twice"):
        read_pickle(b"\x80\x02}(X\x01\0\0\0aK\x01X\x01\0\0\0bK\x02X\x01\0\0\0cK\x05X\x01\0\0\0aK\x03X\x01\0\0\0bK\x04u.")


def test_values_are_those_that_pickle_itself_gives() -> None:
    value: dict[str, Any] = {
        "a": [1, -2, 1 << 70, 2.5, None, True],
        "b": ("x", b"y", ("z",) * 5),
        "ä": {},
        "d": [[], ()],
        "e": ["shared"] * 3,
    }
    for protocol in range(6):
        if protocol > 2:  # earlier ones have no instruction for bytes
            assert read_pickle(pickle.dumps(value, protocol)) == value
        plain = {key: item for key, item in value.items() if key != "b"}
        assert read_pickle(pickle.dumps(plain, protocol)) == plain


def test_a_small_pickle_cannot_take_forever() -> None:
    """Each level holds the one below twice: printed, hashed or walked without care it has 2 ** 60 parts."""
    doubled = b"0".join(b"h%ch%c\x86q%c" % (level, level, level + 1) for level in range(60))
    with pytest.raises(MalformedPickle, match="a key that is a tuple"):
        read_pickle(b"\x80\x02}()q\x000" + doubled + b"K\x01u.")


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6, .* weights_only=True"):
        open_tensors(tmp_path / "a.pt")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, message in (
        ([torch.zeros(1)], "holds a list, expected a dictionary of tensors"),
        ({"epoch": 3, "model": {"a": torch.zeros(1)}}, r"holds 'epoch' \(int\), 'model' \(dict\) beside tensors"),
        ({1: torch.zeros(1)}, r"holds 1 \(torch\._utils\._rebuild_tensor_v2\)"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a has element type torch.ComplexFloatStorage"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            open_tensors(path)
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="not a file that torch wrote"):
        open_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(CheckpointError, match=r"has 0 members NAME/data\.pkl"):
        open_tensors(path)


@pytest.mark.parametrize("kept", [2, 100, -1, -300])
def test_truncated(tmp_path: Path, kept: int) -> None:
    torch.save(tensors(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"a\.pt is cut short or damaged"):
        open_tensors(tmp_path / "a.pt")


def rewritten(path: Path, change: Any) -> None:
    """The archive again, each member as `change(name, data)` gives it; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            changed = change(name, data)
            if changed is not None:
                archive.writestr(name, changed)
    path.write_bytes(buffer.getvalue())


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def offset(name: str, data: bytes) -> bytes:
        return data.replace(b"K\x02K\x03\x86", b"K\x09K\x09\x86") if name.endswith("data.pkl") else data

    for change, message in (
        (lambda name, data: data[:-4] if "/data/" in name else data, "a has 20 bytes in the file, expected 24"),
        (lambda name, data: None if "/data/" in name else data, "a has 0 bytes in the file, expected 24"),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "big-endian"),
        (lambda name, data: data[:-3] if name.endswith("data.pkl") else data, "has a pickle that cannot be read"),
        (offset, "a reaches to element 33 of a storage of 6"),
    ):
        torch.save({"a": torch.zeros(2, 3)}, path)
        rewritten(path, change)
        with pytest.raises(CheckpointError, match=message):
            open_tensors(path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(2, 3)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="is compressed, which torch never does"):
        open_tensors(path)
