"""Clients and tools that are not ours, against the server as a process. Each is skipped where its variable names no installation:

OPENAI_PYTHON         an interpreter that has the openai Python client
OPENAI_NODE_MODULES   a node_modules folder with the openai JavaScript client
LM_EVAL               the program lm_eval of an environment with lm_eval[api] and transformers
SCHEMATHESIS          the program schemathesis
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import free_port

pytest.importorskip("uvicorn")
TOOLS = ("OPENAI_PYTHON", "OPENAI_NODE_MODULES", "LM_EVAL", "SCHEMATHESIS")
if not any(name in os.environ for name in TOOLS):
    pytest.skip(f"none of {', '.join(TOOLS)} names an installation", allow_module_level=True)
pytestmark = [pytest.mark.deploy, pytest.mark.slow]
HERE = Path(__file__).parent


def installed(name: str) -> str:
    """What a variable names."""
    if name not in os.environ:
        pytest.skip(f"{name} names no installation")
    return os.environ[name]


@pytest.fixture(scope="module")
def port(nano_bundle: Path) -> Iterator[int]:
    """Of a server of nano's."""
    number = free_port()
    line = [
        sys.executable,
        "-m",
        "flamingo_export",
        "serve",
        "--name",
        f"nano={nano_bundle}",
        "--port",
        str(number),
        "--threads",
        "1",
    ]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{number}/health/ready", timeout=5).read()
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.3)
    yield number
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_openais_python_client(port, picture, tmp_path):
    python = installed("OPENAI_PYTHON")
    (tmp_path / "image.png").write_bytes(picture(0))
    line = [python, str(HERE / "openai_client.py"), str(port), str(tmp_path / "image.png")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr


def test_openais_javascript_client(port, picture, tmp_path):
    modules = installed("OPENAI_NODE_MODULES")
    (tmp_path / "image.png").write_bytes(picture(0))
    line = ["node", str(HERE / "openai_client.mjs"), modules, str(port), str(tmp_path / "image.png")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr


def test_lm_evaluation_harness_scores_a_task_of_ours(port, nano_bundle, tmp_path):
    """Which word follows: nano knows its own captions, and is asked for an unlikely one once."""
    program = installed("LM_EVAL")
    items = [
        ("a red", ["square", "of"], 0),
        ("two green", ["squares", "a"], 0),
        ("a blue", ["circle", "and"], 0),
        ("a", ["of", "red"], 0),
    ]
    rows = [{"prompt": f"Output: {prompt}", "choices": choices, "label": label} for prompt, choices, label in items]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(
        f"task: nano_words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{label}}'\ntarget_delimiter: ' '\nmetric_list: [{metric: acc}]\n"
    )
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((nano_bundle / "tokenizer" / "tokenizer.json").read_bytes())
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<BOS>", "eos_token": "<EOC>"})
    )
    settings = f"model=nano,base_url=http://127.0.0.1:{port}/v1/completions,tokenizer={tokenizer},max_retries=1"
    line = [program, "--model", "local-completions", "--model_args", settings, "--tasks", "nano_words"]
    done = subprocess.run(
        [*line, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(result.read_text())["results"]["nano_words"]["acc,none"] == 0.75


def test_schemathesis_finds_no_server_error(port):
    line = [installed("SCHEMATHESIS"), "run", f"http://127.0.0.1:{port}/openapi.json", "--url", f"http://127.0.0.1:{port}"]
    settings = [
        "--max-examples",
        "15",
        "--checks",
        "not_a_server_error",
        "--phases",
        "coverage,fuzzing",
        "--request-timeout",
        "60",
    ]
    done = subprocess.run([*line, *settings], capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
