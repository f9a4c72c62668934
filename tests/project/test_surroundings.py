"""What a process of ours leaves behind and what it needs: home folder, telemetry, users without a home, the shell's signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import flamingo_export
from flamingo_export.machine import user_cache
from flamingo_export.sources.choice import source_for_size

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "a.png"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("surroundings") / "random.bundle"
    flamingo_export.build(source_for_size("nano", seed=3), out=path, parity="skip")
    return path


def run(*arguments: object, script: str | None = None, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """The command line (or a script) in a process whose environment is this one's, changed: None takes a variable out."""
    changed = {**os.environ, **environment}
    program = script or "import sys; from flamingo_export.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def generate(bundle: Path) -> tuple[object, ...]:
    return "generate", bundle, "--image", EXAMPLE, "--prompt", "<image>Output:", "--max-new-tokens", "2"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_run_leaves_only_notes_of_the_bundle_in_the_home_folder(bundle, tmp_path):
    """ONNX Runtime 1.29 and later would leave a device id and a queue of events there."""
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": None, "ORT_DISABLE_TELEMETRY": None}
    for arguments in (generate(bundle), ("doctor",), ("parity", bundle, "--against", "reference", "--help")):
        assert run(*arguments, **environment).returncode == 0
    left = files(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(".cache/flamingo-export/verified/")


def test_python_users_have_telemetry_off_too(bundle, tmp_path):
    script = (
        "import sys, flamingo_export\n"
        "model = flamingo_export.load(sys.argv[1])\n"
        "model.generate('<image>Output:', images=[sys.argv[2]], max_new_tokens=2)\n"
    )
    done = run(bundle, EXAMPLE, script=script, HOME=str(tmp_path), XDG_CACHE_HOME=None, ORT_DISABLE_TELEMETRY=None)
    assert done.returncode == 0, done.stderr
    assert [name for name in files(tmp_path) if "verified" not in name] == []


def test_who_asks_for_telemetry_keeps_it():
    script = "import os, flamingo_export; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(script=script, ORT_DISABLE_TELEMETRY="0").stdout == "0\n"
    assert run(script=script, ORT_DISABLE_TELEMETRY=None).stdout == "1\n"


def test_tests_write_into_no_home_folder(tmp_path):
    """What conftest.py sets reaches the processes that tests start."""
    assert run("--version", HOME=str(tmp_path)).returncode == 0
    assert Path(os.environ["XDG_CACHE_HOME"]) == ROOT / ".test-cache"
    assert user_cache("verified") == ROOT / ".test-cache" / "flamingo-export" / "verified"


def test_xdg_cache_home_is_honoured(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (
        (str(tmp_path / "x"), tmp_path / "x"),
        ("relative", tmp_path / ".cache"),
        ("", tmp_path / ".cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert user_cache("kernels") == expected / "flamingo-export" / "kernels"


NOBODY = 54321  # in no passwd


@pytest.mark.skipif(os.getuid() != 0, reason="taking another user's id needs root")
def test_a_user_without_home_or_passwd_entry(bundle):
    # The real id decides which home there is; the effective one stays, so that the interpreter's own files can be read wherever they lie.
    script = (
        f"import os, sys; os.setresuid({NOBODY}, 0, 0)\n"
        "from flamingo_export.machine import user_cache\n"
        "assert user_cache('verified') is None\n"
        "import flamingo_export\n"
        "model = flamingo_export.load(sys.argv[1])\n"
        "model.generate('<image>Output:', images=[sys.argv[2]], max_new_tokens=2)\n"
    )
    done = run(bundle, EXAMPLE, script=script, HOME=None, XDG_CACHE_HOME=None)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_home_is_no_error_in_this_process(monkeypatch):
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", none)
    assert user_cache("verified") is None


def test_the_shells_signals_do_not_reach_the_tests():
    """A shell that starts the suite in the background, or nohup, has it ignore SIGINT and SIGHUP; children would inherit that."""

    def as_in_the_background() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    script = (
        "import signal; before = signal.getsignal(signal.SIGINT); import conftest\n"
        "print(before is signal.SIG_IGN, signal.getsignal(signal.SIGINT) is signal.default_int_handler,"
        " signal.getsignal(signal.SIGHUP) is signal.SIG_DFL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "tests", preexec_fn=as_in_the_background, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout == "True True True\n"
