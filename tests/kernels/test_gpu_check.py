"""scripts/gpu_check and what it is made of, as far as no GPU is wanted."""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import engines, kernel_build, kernel_cases, kernel_oracle, report, stages
from gpu.kernel_library import Args
from gpu.stage import Choice, Context, Failed, NoDevice, NoTime, NotPossible, Stage

ROOT = Path(__file__).resolve().parents[2]

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8flamingo10mma_kernelINS_8MmaShapeINS_6BfloatENS_4E4m3ELi96ELi1ELb0EEEEEv33flamingo_phi_cross_attention_args' for 'sm_90'
ptxas info    : Function properties for _ZN8flamingo10mma_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 124 registers, used 1 barriers, 37376 bytes smem
ptxas info    : Compile time = 100.0 ms
ptxas info    : Compiling entry function '_ZN8flamingo10mma_kernelINS_8MmaShapeINS_4HalfES2_Li128ELi4ELb1EEEEEv33flamingo_phi_cross_attention_args' for 'sm_120'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 32768 bytes smem
ptxas info    : Compiling entry function '_ZN8flamingo11fp32_kernelINS_6SingleEEEv33flamingo_phi_cross_attention_args' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""  # noqa: E501


def test_resources_are_read_from_the_compilers_log():
    assert kernel_build.parse_resources(LOG) == [
        kernel_build.Resources("decode bf16, fp8, 96", "90", 124, 37376, 16, 20),
        kernel_build.Resources("prefill fp16, fp16, 128", "120", 96, 32768, 0, 0),
        kernel_build.Resources("fp32 fp32, fp32, any", "80", 40, 0, 0, 0),
    ]


def test_recorded_resources_are_of_these_sources_and_nothing_spills():
    recorded = json.loads((kernel_build.KERNELS / "resources.json").read_text())
    assert recorded["kernel_sources"] == kernel_build.digest_of_sources(), (
        "run scripts/gpu/resources.py: the kernels have changed"
    )
    kernels = recorded["kernels"]
    # 3 kinds and 2 of ranges x 4 types x 5 head sizes on tensor cores, those that join ranges' parts, fp32 with K and V in fp32 and FP8
    assert len({(k["kernel"], k["architecture"]) for k in kernels}) == (5 * 4 * 5 + 4 + 2 * 2) * len(
        kernel_build.ALL_ARCHITECTURES
    )
    assert {k["kernel"] for k in kernels if k["spilled"] or k["stack"]} == set()
    assert max(k["shared"] for k in kernels) <= 48 << 10  # more would want an attribute, and leave sm_86 with one block


@pytest.mark.skipif(kernel_build.find_compiler() is None, reason="no C++ compiler (g++)")
def test_ctypes_lay_out_the_arguments_as_the_header_does(tmp_path):
    names = [field[0] for field in Args._fields_]
    prints = "".join(f'printf("%zu ", offsetof(A, {name}));' for name in names)
    source = tmp_path / "offsets.cpp"
    source.write_text(
        f'#include <cstdio>\n#include "phi_cross_attention.h"\nusing A = flamingo_phi_cross_attention_args;\n'
        f'int main() {{ {prints} printf("%zu", sizeof(A)); }}\n'
    )
    include = ["-I", kernel_build.EMULATION / "without_cuda", "-I", kernel_build.KERNELS]
    compiler = kernel_build.find_compiler()
    assert compiler is not None
    subprocess.run([compiler, *map(str, include), str(source), "-o", str(tmp_path / "offsets")], check=True)
    offsets = subprocess.run([tmp_path / "offsets"], capture_output=True, text=True, check=True).stdout.split()
    assert [int(x) for x in offsets] == [*(getattr(Args, name).offset for name in names), ctypes.sizeof(Args)]


@pytest.mark.parametrize("layout", kernel_cases.LAYOUTS)
def test_oracle_is_the_definition(layout):
    case = kernel_cases.Case(layout, torch.float32, torch.float32, 32, 16)
    inputs = kernel_cases.make(case, torch.Generator().manual_seed(3), device="cpu")
    y = kernel_oracle.attend(inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi, dtype=torch.float64)
    picked = torch.randperm(inputs.phi.numel(), generator=torch.Generator().manual_seed(4))[:25]
    for b, s in ((int(i) // inputs.phi.shape[1], int(i) % inputs.phi.shape[1]) for i in picked):
        medium = int(inputs.phi[b, s])
        row = int(inputs.media_rows[b, medium - 1]) if 1 <= medium <= inputs.media_rows.shape[1] else -1
        if not 0 <= row < inputs.k.shape[0]:
            assert bool((y[b, s] == 0).all())
            continue
        for head in range(inputs.q.shape[2]):
            query, keys = inputs.q[b, s, head].tolist(), inputs.k[row, head].tolist()
            shares = [math.exp(sum(a * c for a, c in zip(query, key, strict=True)) * 32**-0.5) for key in keys]
            for d in (0, 7, 31):
                values = inputs.v[row, head, :, d].tolist()
                right = sum(p * x for p, x in zip(shares, values, strict=True)) / sum(shares)
                assert float(y[b, s, head, d]) == pytest.approx(right, rel=1e-9, abs=1e-12)


def test_comparison_takes_torchs_result_and_refuses_wrong_ones():
    case = kernel_cases.Case("ragged", torch.bfloat16, torch.float8_e4m3fn, 64, 64)
    inputs = kernel_cases.make(case, torch.Generator().manual_seed(5), device="cpu")
    y = kernel_oracle.attend(
        inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi, dtype=torch.bfloat16, k_scale=0.75, v_scale=1.5
    )
    shares = kernel_cases.compare(inputs, y)
    assert max(shares.values()) < 1
    filled, empty = (inputs.phi > 0).nonzero()[0], (inputs.phi == 0).nonzero()[0]
    for place, value, complaint in (
        (filled, torch.nan, "never written"),
        (filled, 9.0, "greatest error"),
        (empty, 1e-30, "exactly zero"),
    ):
        wrong = y.clone()
        wrong[place[0], place[1], 1, 5] = value
        with pytest.raises(AssertionError, match=complaint):
            kernel_cases.compare(inputs, wrong)


def test_cases_leave_nothing_to_read_but_what_is_seen():
    case = kernel_cases.Case("prompt of 32 images", torch.float16, torch.float16, 32, 16)
    inputs = kernel_cases.make(case, torch.Generator().manual_seed(6), device="cpu")
    seen = kernel_oracle.rows_seen(inputs.media_rows, inputs.phi, 32)
    assert set(seen.unique().tolist()) == {-1, *range(32)}
    assert bool(inputs.q[seen < 0].isnan().all())
    assert not bool(inputs.q[seen >= 0].isnan().any())


MACHINE = {"device": "NVIDIA H200", "commit": "abc1234", "kernel_sources": "1"}


def saved(folder: Path, machine: dict[str, Any] = MACHINE, **statuses: dict[str, Any]) -> dict[str, Any]:
    """Stages as a run writes them, and what is then in the file."""
    path = report.save({"machine": machine, "stages": statuses}, folder)
    assert path.name == "gpu_check-nvidia-h200.json"
    return json.loads(path.read_text())["stages"]


def test_table_says_what_was_not_measured(tmp_path):
    assert report.table(tmp_path).count("not measured") == len(report.RATIOS)
    ratios = {"prefill bf16, share of the copy bandwidth": 0.71, "decode, masked SDPA over ours": 21.5}
    saved(tmp_path, benchmark={"status": "passed", "result": {"ratios": ratios}})
    rows = report.table(tmp_path).splitlines()
    assert rows[0] == "| | NVIDIA H200 (abc1234) |"
    assert "| prefill bf16, share of the copy bandwidth | 71% |" in rows
    assert "| decode, masked SDPA over ours | 21.50 x |" in rows
    assert report.table(tmp_path).count("not measured") == len(report.RATIOS) - 2


def test_table_of_the_docs_is_the_one_that_is_printed():
    assert report.table() in (ROOT / "docs" / "gpu.md").read_text()


def test_results_of_earlier_runs_stay_beside_later_ones(tmp_path):
    """The second call of a quarter of an hour runs the sanitizers alone; the first one's benchmark is not lost."""
    saved(tmp_path, kernels={"status": "passed", "seconds": 41.0}, benchmark={"status": "failed", "seconds": 3.0})
    found = saved(tmp_path, sanitizer={"status": "passed", "seconds": 90.0}, kernels={"status": "no time"})
    assert {name: stage["status"] for name, stage in found.items()} == {
        "kernels": "passed", "benchmark": "failed", "sanitizer": "passed",
    }  # fmt: skip
    assert report.measured(MACHINE, tmp_path) == {"kernels": 41.0, "sanitizer": 90.0}
    other = saved(tmp_path, {**MACHINE, "kernel_sources": "2"}, device={"status": "passed"})
    assert list(other) == ["device"]  # results of other kernels are none of these
    (tmp_path / "gpu_check-nvidia-h200.json").write_text('{"machine": ')  # cut off
    assert report.measured(MACHINE, tmp_path) == {}


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.machine(None)["commit"] is None


# Which stages run.


def choice(*wanted: str, skipped: tuple[str, ...] = (), measured: dict[str, Any] | None = None) -> Choice:
    def nothing(_: Context) -> None:
        return None

    def rehearsed(_: Context) -> dict[str, Any]:
        return {}

    made = [
        Stage("build", nothing, rehearsed, value=1, seconds=30),
        Stage("device", nothing, rehearsed, needs=("build",), value=1, seconds=2),
        Stage("kernels", nothing, rehearsed, needs=("build", "device"), value=100, seconds=60),
        Stage("long", nothing, rehearsed, needs=("device",), value=90, seconds=300),
        Stage("cheap", nothing, rehearsed, value=1, seconds=1),
    ]
    return Choice(made, wanted or [stage.name for stage in made], frozenset(skipped), measured or {})


def order(chosen: Choice, budget: float | None) -> list[str]:
    """The stages that run, each taking what it is said to take."""
    found, left = [], budget
    while now := chosen.next(left):
        for stage in now:
            chosen.done.add(stage.name)
            found.append(stage.name)
            left = None if left is None else left - chosen.cost(stage.name)
    return found


def test_stages_come_in_the_order_asked_for_after_what_they_need():
    assert order(choice("long", "kernels"), None) == ["build", "device", "long", "kernels"]
    assert order(choice("kernels", "cheap", "device"), None) == ["build", "device", "kernels", "cheap"]
    assert order(choice("kernels", skipped=("device",)), None) == ["build", "kernels"]


def test_a_budget_goes_to_what_is_worth_most_a_second():
    chosen = choice()
    assert order(chosen, 100) == ["build", "device", "kernels", "cheap"]
    assert [stage.name for stage in chosen.left_out()] == ["long"]
    assert order(choice(), 40) == ["cheap", "build", "device"]
    assert order(choice(), 0.5) == []
    # What a run on this card has measured counts, not the estimate.
    assert "long" in order(choice(measured={"long": 5.0}), 100)
    assert "kernels" not in order(choice(measured={"kernels": 500.0}), 100)


def test_every_stage_needs_what_there_is():
    names = [stage.name for stage in stages.STAGES]
    assert len(set(names)) == len(names)
    for stage in stages.STAGES:
        assert set(stage.needs) < set(names)
        assert stage.seconds > 0
        assert stage.value > 0


# Sanitizers.


def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Context:
    path = tmp_path / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(stages, "find_sanitizer", lambda: str(path))
    return Context(seed=0, rounds=1, architecture="90", kernels_file=tmp_path / "kernels.so")


def test_memcheck_leaves_other_peoples_calls_alone(tmp_path, monkeypatch):
    """PyTorch's calls that fail by design are none of the kernels' faults."""
    context = sanitizer(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/called')
    assert stages.sanitize(context) == {"memcheck": "clean", "racecheck": "clean", "synccheck": "clean"}
    memcheck, racecheck, synccheck = (tmp_path / "called").read_text().splitlines()
    assert "--report-api-errors no" in memcheck
    assert "--report-api-errors" not in racecheck + synccheck


def test_a_sanitizer_that_refuses_the_device_is_no_failure(tmp_path, monkeypatch):
    context = sanitizer(
        tmp_path, monkeypatch, 'echo "========= Error: Device not supported. Please refer to the documentation"; exit 255'
    )
    with pytest.raises(NotPossible, match="refuses this device"):
        stages.sanitize(context)
    context = sanitizer(tmp_path, monkeypatch, 'echo "========= Invalid __global__ write of size 4 bytes"; exit 9')
    with pytest.raises(Failed, match="Invalid __global__ write"):
        stages.sanitize(context)
    context = sanitizer(tmp_path, monkeypatch, "exec sleep 5")
    context.seconds = 0.2
    with pytest.raises(NoTime, match="memcheck"):
        stages.sanitize(context)


@pytest.mark.slow
@pytest.mark.skipif(kernel_build.find_nvcc() is None, reason="no nvcc (the CUDA toolkit)")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run scripts/gpu_check itself")
def test_without_a_gpu_the_first_cuda_call_says_so(tmp_path):
    """The library is built (no kernel spills on sm_90), loads, and its launch fails with a reason; exit code 3. So does the plugin's, where
    TensorRT's headers are."""
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check"), "--only", "plugin", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["build", "passed"]
    headers = kernel_build.find_headers() is not None
    assert lines[1].split()[:2] == (["plugin-build", "passed"] if headers else ["plugin-build", "not"])
    assert lines[2].split()[:3] == ["device", "no", "device:"]
    assert "first CUDA call failed, of the kernels with cudaError" in lines[2]
    assert ("of the plugin with cudaError" in lines[2]) == headers
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run scripts/gpu_check itself")
def test_a_dry_run_goes_through_every_stage_up_to_its_first_cuda_call(tmp_path):
    """What fails before it fails here, not in the first minutes on a card."""
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check"), "--dry-run", "--skip", "emulation", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert set(found) == {stage.name for stage in stages.STAGES} - {"emulation"}
    reached = {name for name, line in found.items() if "no device:" in line}
    assert {"runtime", "nano"} <= reached, done.stdout
    assert {stage.name for stage in stages.STAGES if stage.name.startswith("tensorrt")} <= reached
    if kernel_build.find_nvcc() is not None:
        assert {"device", "kernels", "benchmark"} <= reached
    assert not [line for line in found.values() if " failed " in line]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "printed", "outcome"),
    [(1, '{"machine": {"memory_suffices": false}}', NoDevice), (1, "", Failed), (0, "{}", NoDevice)],
)
def test_a_plan_that_this_machine_has_too_little_memory_for_is_a_plan(monkeypatch, code, printed, outcome):
    """`--plan` exits with 1 then; the build is meant for the machine with the card."""
    monkeypatch.setattr(
        engines, "_cli", lambda context, command: subprocess.CompletedProcess(command, code, printed, "what went wrong")
    )
    with pytest.raises(outcome):
        engines.rehearse_cli(("build", "--size", "3b", "--out", "BUNDLE"))(None)  # type: ignore[arg-type]


# A whole call, with stages of its own and a card that is made up.

CALL = """
import importlib.machinery, importlib.util, os, signal, sys
loader = importlib.machinery.SourceFileLoader("gpu_check", sys.argv.pop(1))
check = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
loader.exec_module(check)
from gpu.stage import Failed, NoDevice, NotPossible, NoTime, Stage

def ends(how):
    def run(context):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(how, Exception):
            raise how
        return {"ratios": {"decode, FlashInfer over ours": 1.25}}
    return run

def stage(name, how, seconds=1.0, missing=None):
    return Stage(name, lambda context: missing, ends(how), seconds=seconds)

check.STAGES[:] = [
    stage("benchmark", None), stage("sanitizer", NotPossible("it refuses this device")), stage("absent", None, missing="a wheel"),
    stage("slow", NoTime("the budget ended")), stage("long", None, seconds=500.0), stage("killed", "killed"), stage("wrong", Failed("9 of 9")),
]
check.architecture = lambda: "90"
check.report.machine = lambda nvcc: {"device": "NVIDIA H200", "commit": None, "kernel_sources": "1"}
sys.exit(check.main())
"""


def called(folder: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, and the stages that are then in the card's file."""
    command = [sys.executable, "-c", CALL, str(ROOT / "scripts" / "gpu_check"), "--out", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout, json.loads((folder / "gpu_check-nvidia-h200.json").read_text())["stages"]


def test_a_call_that_is_killed_leaves_the_results_of_the_stages_before(tmp_path):
    code, printed, kept = called(tmp_path, "--only", "benchmark", "sanitizer", "killed", "wrong")
    assert code == -9
    assert {name: stage["status"] for name, stage in kept.items()} == {"benchmark": "passed", "sanitizer": "not possible here"}
    assert "| NVIDIA H200" not in printed  # it ends in the middle
    code, printed, kept = called(tmp_path, "--only", "wrong")
    assert code == 1
    assert kept["benchmark"]["result"]["ratios"] == {"decode, FlashInfer over ours": 1.25}
    assert printed.endswith(
        "| decode, bf16 over fp8 | not measured |\n"
    )  # the table of the docs, of this call and those before
    assert "| decode, FlashInfer over ours | 1.25 x |" in printed


def test_only_what_is_wrong_fails_a_call(tmp_path):
    code, printed, kept = called(tmp_path, "--skip", "killed", "wrong", "--budget", "60")
    assert code == 0, printed
    assert {name: stage["status"] for name, stage in kept.items()} == {
        "benchmark": "passed", "sanitizer": "not possible here", "absent": "not installed", "slow": "no time", "long": "no time",
    }  # fmt: skip
    assert "long  no time: takes about 500 s" in printed
    assert "absent  not installed: a wheel" in printed


def test_without_torch_it_says_so():
    """`-I -S`: a Python with nothing installed."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "scripts" / "gpu_check")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "compares with PyTorch, which" in done.stderr
    assert "pip install torch" in done.stderr


def words(stage: str) -> list[list[str]]:
    """The builds of a stage as flamingo-export is given them, of which only the plan is made."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command[3:])
        return subprocess.CompletedProcess(command, 0, "", "")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gpu.engines.subprocess.run", run)
        next(each for each in stages.STAGES if each.name == stage).run(Context(seed=0, rounds=1, architecture=None))
    return [command for command in ran if command[0] == "build"]


@pytest.mark.parametrize("stage", [each.name for each in stages.STAGES if each.name.startswith("tensorrt")])
def test_builds_of_a_stage_are_what_the_command_takes(stage, capsys):
    from flamingo_export.cli import main

    for command in words(stage):
        assert main([*command, "--plan", "--json"]) == 0, capsys.readouterr().err
    policies = [json.loads(line)["precision"]["policy"] for line in jsons(capsys.readouterr().out)]
    in_fp8 = [policy for policy in policies if policy is not None and policy["media"] == "fp8"]
    # Through the plugin alone: TensorRT for RTX runs without one.
    assert len(in_fp8) == (stage == "tensorrt-quantised")


def jsons(text: str) -> list[str]:
    """Documents that were printed one after the other."""
    found, decoder = [], json.JSONDecoder()
    while text.strip():
        _, end = decoder.raw_decode(text := text.lstrip())
        found.append(text[:end])
        text = text[end:]
    return found


def test_a_command_that_fails_does_not_end_the_others(monkeypatch):
    """On a card the figures are wanted where parity fails; of a bundle that was not built there is nothing to want."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(words := command[3:])
        fails = words[0] == "parity" or (words[0] == "build" and words[-1].endswith(".b"))
        return subprocess.CompletedProcess(command, int(fails), "", "reason" if fails else "")

    monkeypatch.setattr("gpu.engines.subprocess.run", run)
    stage = engines.run_cli(
        *[
            (verb, *more, f"BUNDLE{name}")
            for name in (".a", ".b")
            for verb, *more in (["build", "--out"], ["parity"], ["bench"])
        ]
    )
    with pytest.raises(
        Failed, match=r"2 of 4 commands failed, the first: flamingo-export parity BUNDLE\.a: exit 1: reason"
    ) as caught:
        stage(Context(seed=0, rounds=1, architecture=None))
    assert [words[0] for words in ran] == ["build", "parity", "bench", "build"]
    assert len(caught.value.result) == 4


def test_stages_of_engines_build_the_plugin_that_they_want():
    """Also where they are asked for one by one."""
    wanting = [each for each in stages.STAGES if each.name.startswith("tensorrt") and "rtx" not in each.name]
    assert len(wanting) == 3
    assert all({"build", "plugin-build"} <= set(each.needs) for each in wanting)


def test_headers_are_those_that_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    with pytest.raises(kernel_build.BuildFailed, match=r"has no include/NvInferRuntime\.h"):
        kernel_build.find_headers()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").touch()
    assert kernel_build.find_headers() == tmp_path / "include"
    monkeypatch.chdir(tmp_path.parent)  # compilers run in other folders
    monkeypatch.setenv("TENSORRT_ROOT", tmp_path.name)
    assert kernel_build.find_headers() == tmp_path / "include"


@pytest.mark.parametrize("wrong", [None, "parity"])
def test_the_packages_own_backend_is_asked_on_onnxruntimes_gpu(wrong, monkeypatch):
    """After the steps beside PyTorch: its parity and an answer, and what either says where it fails."""
    asked = []

    def python(context, code, words, before=()):
        asked.append(words[0])
        row = {"length": 512, "batch": 1, "difference": {"logits": 1e-3, "caches": 1e-3}}
        measured = json.dumps(
            {"model": "nano", "type": "fp16", "onnxruntime": "1.32.0", "operators_on_the_cpu": {}, "rows": [row]}
        )
        failing = words[0] == wrong
        return subprocess.CompletedProcess(
            words, int(failing), "" if failing else measured, "it left Attention to the CPU" if failing else ""
        )

    monkeypatch.setattr(engines, "_python", python)
    monkeypatch.setattr("gpu.engines.wheels.FOLDER", Path("/nowhere"))
    context = Context(seed=0, rounds=1, architecture=None)
    if wrong is None:
        found = engines.run_onnxruntime(context)
        assert list(found["commands"]) == [
            "flamingo-export parity --backend onnxruntime --device cuda",
            "flamingo-export generate --backend onnxruntime --device cuda",
        ]
        assert asked.count("parity") == asked.count("generate") == 1
        assert "3b" in found
    else:
        with pytest.raises(Failed, match="it left Attention to the CPU"):
            engines.run_onnxruntime(context)
