"""The command as a whole: help, versions, exit codes, and that asking for help loads nothing heavy."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import flamingo_export
import flamingo_export.cli.inspect as inspect_module
from flamingo_export.cli import standard_streams
from flamingo_export.cli.app import app
from flamingo_export.errors import BundleError

GROUP: Any = get_command(app)
VERBS = sorted(GROUP.commands)
HEAVY = ("torch", "onnxruntime", "onnx", "onnx_ir", "matplotlib", "jinja2", "transformers", "PIL", "tokenizers", "numpy")


def test_help_names_every_verb(cli):
    outcome = cli("--help")
    assert outcome.code == 0
    assert {"build", "generate", "score", "parity", "inspect", "doctor", "bench"} <= set(VERBS)
    for verb in VERBS:
        assert re.search(rf"(?m)^  {verb} +[A-Z]", outcome.out)


def test_each_file_of_a_verb_is_in_the_app():
    """A verb that was written but never registered would be missing from the help, and from tests that ask the app."""
    folder = Path(inspect_module.__file__).parent
    written = {path.stem for path in folder.glob("*.py") if re.search(r"(?m)^    as_json: AsJson", path.read_text("utf-8"))}
    assert {"generate", "refit", "calibrate"} <= written <= set(VERBS)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_options_and_values(shell):
    def completed(line):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - (not line.endswith(" ")))}
        words |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        words |= {"_TYPER_COMPLETE_WORD_TO_COMPLETE": line.split(" ")[-1], "_FLAMINGO_EXPORT_COMPLETE": f"complete_{shell}"}
        script = "import sys; from flamingo_export.cli import main; sys.exit(main())"
        line = [sys.executable, "-c", script]
        return subprocess.run(line, env={**os.environ, **words}, capture_output=True, text=True, check=True, timeout=60).stdout

    assert re.findall(r"\b(calibrate|generate|build)\b", completed("flamingo-export cal")) == ["calibrate"]
    assert "--num-return" in completed("flamingo-export generate --num")
    assert "tensorrt-rtx" in completed("flamingo-export generate --backend tens")
    assert "nano" in completed("flamingo-export build --size n")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(cli, verb):
    outcome = cli(verb, "--help")
    assert outcome.code == 0
    assert "Usage: flamingo-export " + verb in outcome.out


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_heavy(arguments):
    """The half second that help may take goes by imports; names are a surer measure than a clock on a shared machine."""
    script = (
        "import json, sys\n"
        "from flamingo_export.cli import main\n"
        f"code = main({arguments!r})\n"
        f"print(json.dumps([code, sorted(set({HEAVY!r}) & set(sys.modules))]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]


def test_version(cli):
    outcome = cli("--version")
    assert (outcome.code, outcome.out.strip()) == (0, f"flamingo-export {version('flamingo-export')}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"],
        ["inspect"],
        ["inspect", "a.bundle", "--size", "9b"],
        ["inspect", "--size", "10b"],
        ["build"],
        ["build", "--size", "nano", "--checkpoint", "ckpt"],
        ["build", "--size", "nano", "--storage", "fp7"],
        ["generate"],
        ["generate", "a.bundle", "--no-such-option"],
        ["generate", "a.bundle", "--beams", "0"],
        ["generate", "a.bundle", "--prompt", "<image>", "--question", "what?", "--image", "a.png"],
        ["generate", "a.bundle", "--prompt", "<image>", "--shots", "s.jsonl"],
        ["score", "a.bundle", "--prompt", "x"],
        ["doctor", "--folder", "/no/such/folder"],
    ],
)
def test_a_mistaken_line_exits_with_2_and_prints_no_result(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Usage" in outcome.err


def test_a_failure_exits_with_1_and_one_line(cli, tmp_path):
    outcome = cli("inspect", tmp_path / "missing.bundle")
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert "does not exist" in outcome.err
    assert "flamingo-export build" not in outcome.err  # whoever inspects wants no other bundle in its place
    assert "flamingo-export build" in cli("generate", tmp_path / "missing.bundle", "--prompt", "x").err


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(cli, tmp_path, place):
    line = ["inspect", str(tmp_path / "missing.bundle")]
    line.insert(place, "--debug")
    outcome = cli(*line)
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert BundleError.__name__ in outcome.err


def test_an_unexpected_error_is_called_a_bug_and_an_interruption_is_not(cli, monkeypatch):
    def fail(config):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(inspect_module, "components", fail)
    outcome = cli("inspect", "--size", "nano")
    assert outcome.code == 1
    assert "bug" in outcome.err
    assert "a fault of ours" in outcome.err
    assert "Traceback" not in outcome.err

    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_module, "components", interrupt)
    outcome = cli("inspect", "--size", "nano")
    assert outcome.code == 130
    assert "interrupted" in outcome.err


@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
@pytest.mark.parametrize("failure", ["pass", "raise ImportError('cannot load module')"])
@pytest.mark.parametrize("module", ["typer", "flamingo_reference.config"])
def test_a_signal_during_imports_ends_as_gracefully_as_later(number, code, word, failure, module):
    """The first module loads before the verbs are known, the second inside of one; an extension may turn the interruption into ImportError."""
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell said
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.{number})
            finally:
                {failure}
sys.meta_path.insert(0, Finder())
from flamingo_export.cli import main
sys.exit(main(["inspect", "--size", "nano"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"flamingo-export: {word}\n")


def test_handlers_of_the_caller_are_left_alone(cli):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert cli("--version").code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "flamingo_export", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, f"flamingo-export {version('flamingo-export')}")


def test_the_installed_command_and_a_closed_pipe():
    """`flamingo-export ... | head -1` ends without a complaint."""
    line = f"'{sys.executable}' -c 'import sys; from flamingo_export.cli import main; sys.exit(main())' inspect --size 9b --json | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{"
    assert done.stderr == ""


def test_an_unexpected_error_names_packages_of_versions_that_are_not_admitted(cli, monkeypatch, tmp_path):
    """typer 0.15 with click 8.5 fails on its own help with a TypeError, for one."""
    from flamingo_export.cli import probes

    def broken(*_: object) -> None:
        raise TypeError("make_metavar() takes 1 positional argument but 2 were given")

    (tmp_path / "manifest.json").touch()
    monkeypatch.setattr(probes, "requires", lambda name: ["typer>=0.24"])
    monkeypatch.setattr(inspect_module, "_inspect_bundle", broken)
    assert "2 were given. This is a bug; --debug shows where." in cli("inspect", tmp_path).err
    versions = {"typer": "0.15.0"}
    monkeypatch.setattr(probes, "version", lambda name: versions.get(name) or version(name))
    told = cli("inspect", tmp_path)
    assert told.code == 1
    assert (
        "2 were given. Python packages are of a version that is not admitted: typer 0.15.0. pip install 'typer>=0.24'"
        in told.err
    )


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("build", 'Python callable that returns the vision encoder, for checkpoints whose config has "type": "own".'),
        ("sensitivity", "A bundle; weights are read from the checkpoint it was built from."),
        ("inspect", "or what building a checkpoint or size would produce."),
    ],
)
def test_help_is_plain(cli, verb, words):
    assert words in " ".join(cli(verb, "--help").out.split())


@pytest.mark.parametrize("option", [["--calibration", "x.json"], ["--uncalibrated"]])
def test_what_only_applies_to_quantised_builds(cli, tmp_path, option):
    outcome = cli("build", "--size", "nano", "--parity", "skip", "--out", tmp_path / "x.bundle", *option)
    assert outcome.code == 1
    assert f"{option[0]} only applies to quantised builds" in outcome.err


def test_a_call_from_python_leaves_no_log_handler(cli, bundle, pictures):
    before = list(logging.getLogger("flamingo_export").handlers)
    assert cli("generate", bundle, "--image", pictures / "a.png", "--max-new-tokens", "1").code == 0
    assert logging.getLogger("flamingo_export").handlers == before


def _ran(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What a shell makes of a line in which `it` is the command."""
    it = f'it() {{ {shlex.quote(sys.executable)} -m flamingo_export "$@"; }}; '
    return subprocess.run(["bash", "-c", it + line], env={**os.environ, **environment}, capture_output=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("verb", ["inspect --size nano", "build --size nano --parity skip --out {}"])
def test_closed_streams_are_no_fault(tmp_path, closed, verb):
    made = tmp_path / "made.bundle"
    done = _ran(f"it {verb.format(shlex.quote(str(made)))} {closed}")
    assert (done.returncode, b"Error" in done.stderr) == (0, False)
    assert (b"nano" in done.stdout) == (closed == "2>&-")
    if "build" in verb:
        flamingo_export.load(made).close()  # no remark went into a file that got the closed stream's number


@pytest.mark.slow
def test_an_encoding_without_a_character_has_its_escape():
    script = "from flamingo_export.cli.standard_streams import usable\nwith usable():\n    print('donn\\xe9es caf\\udce9')"
    for encoding, expected in (
        ("ascii:strict", b"donn\\xe9es caf\\udce9\n"),
        ("utf-8:strict", "données caf".encode() + b"\xe9\n"),
    ):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True, timeout=60)
        assert done.stdout == expected


def test_streams_are_left_as_they_were():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", None)
        with standard_streams.usable():
            print("x", file=sys.stderr)
            assert stream.errors == "surrogateescape"
        assert (sys.stdout, sys.stderr, stream.errors) == (stream, None, "strict")


def test_commands_in_messages_can_be_typed_where_a_path_has_a_blank(cli, tmp_path):
    path = tmp_path / "my bundle"
    path.mkdir()
    for given in (path, tmp_path / "no 'bundle'"):
        command = cli("generate", given, "--image", "a.png").err.partition("flamingo-export build ")[2]
        assert shlex.split(command)[-2:] == ["--out", str(given)]
    made = cli("build", "--size", "nano", "--parity", "skip", "--out", tmp_path / "new bundle")
    assert shlex.split(made.out.rpartition("flamingo-export parity ")[2]) == [str(tmp_path / "new bundle")]


def test_names_that_are_not_utf8_are_refused_before_anything_is_written(cli, tmp_path, bundle):
    named = tmp_path / os.fsdecode(b"caf\xe9")
    outcome = cli("build", "--size", "nano", "--parity", "skip", "--out", named / "n.bundle")
    assert (outcome.code, "is not UTF-8, which ONNX Runtime cannot open" in outcome.err) == (1, True)
    assert not named.exists()
    shutil.copytree(bundle, named)
    outcome = cli("generate", named, "--image", "a.png")
    assert (outcome.code, "is not UTF-8, which ONNX Runtime cannot open" in outcome.err) == (1, True)
    assert json.loads(cli("inspect", named, "--json").out)["bundle"] == str(named)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_manifest_that_never_ends_is_not_read(cli, tmp_path, kind):
    manifest = tmp_path / "manifest.json"
    if kind == "pipe":
        os.mkfifo(manifest)
    else:
        manifest.symlink_to("/dev/zero")
    outcome = cli("generate", tmp_path, "--image", "a.png")
    assert (outcome.code, "manifest.json is not a file" in outcome.err) == (1, True)
    assert cli("inspect", tmp_path).code == 1


@pytest.mark.parametrize(
    ("line", "option"),
    [
        (("generate", "{}", "--image", ""), "--image"),
        (("generate", "{}", "--image="), "--image"),
        (("inspect", ""), "bundle"),
        (("parity", "{}", "--html", ""), "--html"),
        (("package", "{}", "--for", "docker", "--out", ""), "--out"),
        (("build", "--checkpoint", "", "--out", "x.bundle"), "--checkpoint"),
    ],
)
def test_an_empty_path_is_not_the_folder_one_is_in(cli, bundle, tmp_path, monkeypatch, line, option):
    """As `--image "$UNSET"` gives it; `.` by its name is one."""
    monkeypatch.chdir(tmp_path)
    outcome = cli(*(str(bundle) if part == "{}" else part for part in line))
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(rf"Invalid value for '?{option}'?: the path is empty", outcome.err)
    assert not list(tmp_path.iterdir())
    assert "the path is empty" not in cli("inspect", ".").err


def test_a_file_is_not_a_bundle(cli, bundle):
    for given in (bundle / "manifest.json", "/dev/null"):
        outcome = cli("generate", given, "--image", "a.png")
        assert (outcome.code, f"{given} is not a folder, and a bundle is one" in outcome.err) == (1, True)


@pytest.mark.parametrize("given", [["--install-completion", "bash"], ["--install-completion=bash"]])
def test_completion_is_not_installed_where_there_is_no_home_folder(cli, tmp_path, monkeypatch, given):
    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.chdir(tmp_path)
    for home in (None, "", "here"):
        with monkeypatch.context() as patch:
            patch.delenv("HOME")
            patch.setattr("pwd.getpwuid", unknown)
            if home is not None:
                patch.setenv("HOME", home)
            outcome = cli(*given)
        assert (outcome.code, "there is no home folder" in outcome.err, "bug" in outcome.err) == (1, True, False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--html", "--suggest"])
def test_sensitivity_says_before_the_work_what_it_cannot_write(cli, bundle, tmp_path, monkeypatch, option):
    monkeypatch.setattr("flamingo_export.sensitivity.measure", lambda *_, **__: pytest.fail("the work was begun"))
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "it"):
        outcome = cli("sensitivity", bundle, "--fp8", option, place)
        assert outcome.code == 2
        assert f"Invalid value for {option}" in outcome.err
