"""doctor: what is found is printed, what is missing comes with its remedy; probes are tried on stand-ins."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import pytest

from flamingo_export.backends.tensorrt import library, plugin
from flamingo_export.cli import doctor, probes


def test_the_report_in_both_forms(cli, tmp_path):
    text, data = cli("doctor", "--folder", tmp_path), cli("doctor", "--folder", tmp_path, "--json")
    assert text.code == data.code == 0
    report = json.loads(data.out)
    assert report["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert report["hardware"]["disk_folder"] == str(tmp_path)
    assert {task["name"]: task["found"] for task in report["tasks"]}["build, generate, score, bench on the CPU"] is True
    for name in ("ONNX Runtime", "PyTorch", "TensorRT headers", "80b"):
        assert name in text.out


def test_a_current_folder_that_was_removed_is_named_as_that(cli, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for line in (["doctor"], ["build", "--size", "nano", "--plan", "--out", "x.bundle"]):
        outcome = cli(*line)
        assert outcome.code == 1
        assert outcome.err.startswith("flamingo-export: the current folder was removed. Change to one that exists"), outcome.err
    assert cli("doctor", "--folder", tmp_path, "--json").code == 0  # it is not needed


def test_memory_and_disk_decide_which_sizes_fit():
    hardware = probes.Hardware(
        system="", python="", processor="", cores=1, vector_extensions=(), memory=16 << 30,
        memory_available=14 << 30, disk_folder="", disk_free=10 << 30,
    )  # fmt: skip
    fits = {fit.size: (fit.disk_suffices, fit.memory_suffices) for fit in doctor._sizes(hardware)}
    small, large = dict.fromkeys(("nano", "3b"), (True, True)), dict.fromkeys(("9b", "80b"), (False, False))
    assert fits == small | large | dict.fromkeys(("llama-3.2-11b-vision", "llama-3.2-90b-vision"), (False, False))


def test_what_is_missing_comes_with_a_remedy(monkeypatch):
    monkeypatch.setattr(probes, "package", lambda name, *modules: None)
    monkeypatch.setattr("flamingo_export.cli.probes.shutil.which", lambda name: None)
    monkeypatch.setattr(probes, "_first_file", lambda name, folders: None)
    monkeypatch.setattr("flamingo_export.cli.probes.ctypes.util.find_library", lambda name: None)
    monkeypatch.setattr(probes, "_wheel_library", lambda module, pattern: None)
    monkeypatch.setattr(library, "installed", lambda which: False)
    monkeypatch.setattr(plugin, "find_plugin", lambda: None)
    for finding in [probes.torch(), *probes.tensorrt()]:
        assert not finding.found
        assert finding.remedy


def test_headers_are_found_through_tensorrt_root(monkeypatch, tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInfer.h").touch()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    headers = {finding.name: finding for finding in probes.tensorrt()}["TensorRT headers"]
    assert (headers.found, headers.detail) == (True, str(tmp_path / "include" / "NvInfer.h"))


def test_what_can_be_built_follows_from_what_is_there(monkeypatch):
    monkeypatch.setattr("flamingo_export.backends.tensorrt.library.device", lambda index=0: None)

    def findings(*names):
        every = (probes.RTX, probes.DATACENTER, probes.PLUGIN)
        return [
            probes.Finding(name=name, found=name in names, detail="", remedy=None if name in names else f"get {name}")
            for name in every
        ]

    gpu = probes.Gpu(name="Some GPU", compute_capability="9.0", memory=1)
    rtx, datacenter, *_ = doctor._engine_tasks(findings(probes.RTX), [])
    assert (rtx.found, datacenter.found) == (True, False)
    assert datacenter.detail == "needs TensorRT, a GPU, the plugin"
    assert datacenter.remedy == f"get {probes.DATACENTER}"
    rtx, datacenter, *run = doctor._engine_tasks(findings(probes.DATACENTER, probes.PLUGIN), [gpu])
    assert (rtx.found, datacenter.found, any(each.found for each in run)) == (False, True, False)


class FakeDriver:
    """The calls of libcuda that the probe makes, for one GPU; `status` is what cuInit returns."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags):  # noqa: N802
        return self.status

    def cuGetErrorString(self, status, text):  # noqa: N802
        text._obj.value = b"no CUDA-capable device is detected"

    def cuDriverGetVersion(self, number):  # noqa: N802
        number._obj.value = 13020

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = 1

    def cuDeviceGet(self, device, ordinal):  # noqa: N802
        device._obj.value = ordinal

    def cuDeviceGetName(self, name, length, device):  # noqa: N802
        name.value = b"Some GPU"

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802
        memory._obj.value = 24 << 30

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 8, 76: 9}[attribute]


def test_the_driver_is_asked_for_its_devices(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    finding, gpus = probes.cuda()
    assert (finding.found, finding.detail) == (True, "CUDA 13.2, 1 GPUs")
    assert gpus == [probes.Gpu(name="Some GPU", compute_capability="8.9", memory=24 << 30)]


def test_a_driver_that_does_not_start_is_reported(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(status=100))
    finding, gpus = probes.cuda()
    assert not finding.found
    assert gpus == []
    assert "no CUDA-capable device" in finding.detail


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    finding, gpus = probes.cuda()
    assert (finding.found, gpus) == (False, [])
    assert finding.remedy


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo, which Linux has")
def test_the_processor_has_a_name():
    name, flags = probes._processor()
    assert name
    assert set(flags) <= {
        "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm",
    }  # fmt: skip
