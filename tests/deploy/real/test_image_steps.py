"""What the generated Dockerfiles do, step by step in a fresh environment: no image is built, but what it would install is, and it serves.

make test-deploy
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import flamingo_export
from flamingo_export.deploy.package import package

from .conftest import chat_body, free_port, post

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.skipif(
        "FLAMINGO_NANO" not in os.environ, reason="installs the newest versions there are: make test-deploy-image"
    ),
]
ROOT = Path(flamingo_export.__file__).resolve().parents[1]
OF_THE_SYSTEM = ("useradd", "apt-get")
"""Steps that would change this machine; what they are for is here already."""


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and argument of each line of a Dockerfile."""
    lines = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8")).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line and not line.startswith("#")]


def steps(found: list[tuple[str, str]]) -> list[str]:
    """Commands that install something, without those of the system."""
    commands = [part.strip() for name, argument in found if name == "RUN" for part in argument.split("&&")]
    return [command for command in commands if not command.startswith((*OF_THE_SYSTEM, "rm -rf /var/lib/apt"))]


@pytest.fixture(scope="module")
def image(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated folder with the wheel in it, made as its README says."""
    folder = tmp_path_factory.mktemp("image") / "out"
    package(nano_bundle, "docker", folder)
    line = next(
        line.strip() for line in (folder / "README.md").read_text().splitlines() if line.strip().startswith("pip wheel")
    )
    line = line.replace("FOLDER-OF-FLAMINGO-EXPORT", str(ROOT)).replace("pip ", "-m pip -qq ", 1)
    subprocess.run([sys.executable, *line.split()], cwd=folder, check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def installed(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment in which the CPU image's commands have run."""
    folder = tmp_path_factory.mktemp("container")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=120)
    shutil.copytree(image / "wheels", folder / "wheels")
    environment = {**os.environ, "PATH": f"{folder / 'venv' / 'bin'}:/usr/bin:/bin"}
    commands = steps(instructions(image / "Dockerfile"))
    assert [command.split()[:2] for command in commands] == [["pip", "install"], ["rm", "-rf"]]
    for command in commands:
        subprocess.run(command.replace("/wheels", str(folder / "wheels")), shell=True, env=environment, check=True, timeout=900)
    return folder


@pytest.fixture
def served(image: Path, installed: Path, nano_bundle: Path) -> Iterator[tuple[int, str]]:
    """Port and health check of what the image starts, with /bundle and the port being those of this machine."""
    found = dict(instructions(image / "Dockerfile"))
    port = free_port()
    line = [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]
    line = [word.replace("/bundle", str(nano_bundle)) for word in line]
    line[line.index("--host") + 1] = "127.0.0.1"
    variable, _, value = found["ENV"].partition("=")
    assert (variable, value) == ("XDG_CACHE_HOME", "/tmp")
    environment = {
        "PATH": f"{installed / 'venv' / 'bin'}:/usr/bin:/bin",
        "HOME": "/nonexistent",
        variable: str(installed / "tmp"),
    }
    process = subprocess.Popen([*line, "--port", str(port)], env={**environment, "OMP_NUM_THREADS": "1"}, cwd="/")
    check = found["HEALTHCHECK"]
    yield port, check[check.index("[") :].replace(":8000/", f":{port}/")
    process.send_signal(getattr(signal, found["STOPSIGNAL"]))
    assert process.wait(60) == 0


def test_what_the_image_installs_serves(served, installed, picture):
    port, check = served
    line = json.loads(check)
    line[0] = str(installed / "venv" / "bin" / line[0])
    end = time.monotonic() + 120
    while subprocess.run(line, stderr=subprocess.DEVNULL, check=False).returncode:
        assert time.monotonic() < end, "the image's health check never passed"
        time.sleep(0.5)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as found:
        (model,) = json.loads(found.read())["data"]
    status, answer = post(port, chat_body(picture(0)) | {"model": model["id"]})
    assert (status, "square" in str(json.loads(answer)["choices"][0]["message"]["content"])) == (200, True)


def test_prometheus_and_grafana_ask_for_what_is_there(served, image):
    """Compose's names, ports and files fit each other; the address that Prometheus reads has every metric of the dashboard."""
    compose = yaml.safe_load((image / "compose.yaml").read_text())["services"]
    (job,) = yaml.safe_load((image / "prometheus.yml").read_text())["scrape_configs"]
    name, number = job["static_configs"][0]["targets"][0].split(":")
    assert (name in compose, number) == (True, "8000")
    source = yaml.safe_load((image / "grafana-datasource.yaml").read_text())["datasources"][0]
    assert source["url"].removeprefix("http://").partition(":")[0] in compose
    for service in compose.values():
        for mount in service.get("volumes", []):
            if mount.startswith("./"):
                assert (image / mount.split(":")[0]).is_file(), mount
    panels = json.loads((image / "dashboard.json").read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels if "datasource" in panel} <= {source["uid"]}
    port = served[0]
    end = time.monotonic() + 120
    while True:
        try:
            page = (
                urllib.request.urlopen(f"http://127.0.0.1:{port}{job.get('metrics_path', '/metrics')}", timeout=30)
                .read()
                .decode()
            )
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.5)
    offered = set(re.findall(r"^# TYPE (flamingo_[a-z_]+) ", page, re.MULTILINE))
    offered |= {f"{metric}_bucket" for metric in offered}
    asked = set(re.findall(r"flamingo_[a-z_]+", " ".join(target["expr"] for panel in panels for target in panel["targets"])))
    assert asked
    assert asked <= offered


def test_what_the_cuda_image_installs_can_be_had(image, tmp_path):
    """Resolved for its Python, Ubuntu 24.04's, and not installed: gigabytes that run on a GPU only."""
    commands = steps(instructions(image / "Dockerfile.cuda"))
    (command,) = [command for command in commands if command.startswith("pip install")]
    (wheel,) = (image / "wheels").glob("*.whl")
    extras = re.search(r"\.whl\)(\[[a-z,]+\])", command)
    assert extras
    options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version", "3.12", "--target", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, f"{wheel}{extras[1]}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"Would install .*onnxruntime-gpu-", done.stdout)
