"""What `import flamingo_export` gives stays what it is, whichever modules have been imported, and has types that a checker reads."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import flamingo_calibration
import flamingo_export
import flamingo_export.errors
import flamingo_reference

PROGRAM = """
from pathlib import Path

import flamingo_export

model = flamingo_export.load("nano.bundle")
answer = model.generate("<image>Output:", images=["a.png"], beams=3)
reveal_type(model)
reveal_type(answer)
print(answer.text, answer.token_logprobs)
with model.stream("<image>Output:", images=[Path("a.png")]) as stream:
    for piece in stream:
        reveal_type(piece)
        print(piece, end="", flush=True)
requests = [flamingo_export.Request(prompt="<image>Output:", media=[path]) for path in ("a.png", "q.png")]
answers = model.generate(requests)
reveal_type(answers)
shots = [flamingo_export.Shot(answer="a cat", medium="a.png")]
reveal_type(model.caption("q.png", shots=shots, max_new_tokens=3))
reveal_type(model.ask("q.png", "What?", shots="shots.jsonl"))
reveal_type(model.score("<image>It is", ["red", "blue"], images=["a.png"]))
reveal_type(flamingo_export.__version__)
try:
    flamingo_export.build("checkpoint", out="x.bundle")
except flamingo_export.CheckpointError as error:
    print(error)
x: int = answer.text
model.generate("<image>Output:", num_beams=3)
flamingo_export.no_such_name
"""


def test_no_module_hides_a_public_name() -> None:
    """Importing a submodule sets an attribute of its name on the package."""
    modules = {module.name for module in pkgutil.iter_modules(flamingo_export.__path__)}
    assert modules.isdisjoint(flamingo_export.__all__)


def test_every_name_is_there_and_every_error_is_among_them() -> None:
    for name in flamingo_export.__all__:
        assert getattr(flamingo_export, name) is not None
        assert name in dir(flamingo_export)
    errors = {
        name
        for name, value in vars(flamingo_export.errors).items()
        if isinstance(value, type) and issubclass(value, flamingo_export.FlamingoExportError)
    }
    assert errors <= set(flamingo_export.__all__)
    assert flamingo_export.__version__ == version("flamingo-export")
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(flamingo_export, "no_such_name")  # noqa: B009


def test_each_package_says_that_it_has_types() -> None:
    for package in (flamingo_export, flamingo_reference, flamingo_calibration):
        assert package.__file__ is not None
        assert (Path(package.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
def test_a_users_program_is_checked(tmp_path: Path) -> None:
    """As mypy --strict sees it from outside: the package's types arrive, and mistakes in the last lines are found."""
    program, config = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(PROGRAM, encoding="utf-8")
    config.write_text(
        "[mypy]\nstrict = true\n" + "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "onnx"))
    )
    line = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache"), str(program)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    revealed = re.findall(r'Revealed type is "([^"]+)"', done.stdout)
    model, texts = "flamingo_export.runtime.model", "flamingo_export.runtime.texts"
    assert revealed == [
        f"{model}.Model",
        f"{texts}.Generation",
        "str",
        f"list[{texts}.Generation]",
        f"{texts}.Generation",
        f"{texts}.Generation",
        f"list[{texts}.Score]",
        "str",
    ], done.stdout
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    wanted = ['type "str", variable has type "int"', "num_beams", "No overload variant", 'no attribute "no_such_name"']
    assert len(errors) == len(wanted), done.stdout
    for error, words in zip(errors, wanted, strict=True):
        assert words in error


def test_few_modules_stand_loose_at_the_top() -> None:
    """What everything stands on, and what a user imports; the rest has a room."""
    loose = {module.name for module in pkgutil.iter_modules(flamingo_export.__path__) if not module.ispkg} - {"__main__"}
    assert len(loose) <= 8, loose
