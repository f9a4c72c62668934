"""Where continuous integration has installed what tests want, a test that is skipped for want of it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_skips_for_the_named_reasons_fail(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_a():\n    pytest.skip('no Chromium on this machine')\n"
        "@pytest.mark.skipif(True, reason='no Chromium on this machine')\n"
        "def test_b():\n    pass\n"
        "def test_c():\n    pytest.skip('there is a GPU')\n"
    )
    for pattern, wanted in (("Chromium|Java", "1 failed, 1 skipped, 1 error"), ("", "3 skipped")):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
        environment = os.environ | {"FLAMINGO_TESTS_MUST_RUN": pattern}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert re.search(rf"^{wanted} in", done.stdout, flags=re.MULTILINE), done.stdout + done.stderr


def test_continuous_integration_names_reasons_that_tests_give() -> None:
    """A reason in `.ci/run` that no test gives any more would guard nothing."""
    pattern = re.search(r"FLAMINGO_TESTS_MUST_RUN='([^']+)'", (ROOT / ".ci/run").read_text(encoding="utf-8"))
    assert pattern
    texts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    for each in pattern[1].split("|"):
        assert re.search(each, texts.replace("{program} is not", "cmake is not")), each
