"""Generated folders: complete, valid by their schemas, and in step with the server that they start."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

import flamingo_export
from flamingo_export.cli import main
from flamingo_export.cli.app import app
from flamingo_export.deploy.package import HOSTS, package
from flamingo_export.errors import BuildError, BundleError
from flamingo_export.sources.choice import source_for_size

KUBERNETES = "1.30"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deploy") / "My_nano 2.bundle"
    flamingo_export.build(source_for_size("nano", seed=3), out=path, parity="skip")
    return path


@pytest.fixture(params=HOSTS)
def folder(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> Path:
    package(bundle, request.param, tmp_path / "out")
    return tmp_path / "out"


def documents(folder: Path) -> list[tuple[Path, Any]]:
    files = [path for path in folder.iterdir() if path.suffix in (".yaml", ".yml")]
    return [(path, document) for path in files for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def test_nothing_is_left_to_fill_in(folder: Path) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not re.search(r"@[a-z_]+@", path.read_text(encoding="utf-8")), path
    assert len((folder / "README.md").read_text(encoding="utf-8").splitlines()) <= 12
    assert documents(folder) or not (folder / "claim.yaml").exists()


def test_run_is_a_program_that_says_how_it_is_used(folder: Path) -> None:
    done = subprocess.run([str(folder / "run")], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, "usage: ./run BUNDLE" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("host", "program", "expected"),
    [
        ("docker", "docker", ["docker compose up --build"]),
        (
            "kubernetes",
            "kubectl",
            [
                "kubectl apply -f claim.yaml -f loader.yaml",
                "kubectl wait --for=condition=Ready pod/my-nano-2-loader --timeout=300s",
                "kubectl cp BUNDLE/. my-nano-2-loader:/bundle",
                "kubectl delete pod my-nano-2-loader",
                "kubectl apply -f deployment.yaml -f service.yaml",
                "kubectl rollout status deployment/my-nano-2",
            ],
        ),
        (
            "kserve",
            "kubectl",
            [
                "kubectl apply -f claim.yaml -f loader.yaml",
                "kubectl wait --for=condition=Ready pod/my-nano-2-loader --timeout=300s",
                "kubectl cp BUNDLE/. my-nano-2-loader:/bundle",
                "kubectl delete pod my-nano-2-loader",
                "kubectl apply -f inferenceservice.yaml",
                "kubectl wait --for=condition=Ready inferenceservice/my-nano-2 --timeout=600s",
            ],
        ),
    ],
)
def test_run_calls_the_hosts_program(bundle: Path, tmp_path: Path, host: str, program: str, expected: list[str]) -> None:
    """With a program of that name that notes its arguments, and whether the files that they name are there."""
    package(bundle, host, tmp_path / "out")
    (tmp_path / "bin").mkdir()
    note = tmp_path / "bin" / program
    note.write_text(
        f'#!/bin/sh\nls $(echo "$*" | grep -o "[a-z]*\\.yaml") >/dev/null || exit 9\necho "{program} $*|$BUNDLE" >> "{tmp_path}/calls"\n'
    )
    note.chmod(0o755)
    environment = {**os.environ, "PATH": f"{note.parent}:/usr/bin:/bin"}

    def run() -> subprocess.CompletedProcess[str]:
        # The bundle is named as a user in its folder would.
        return subprocess.run(
            [str(tmp_path / "out" / "run"), bundle.name],
            cwd=bundle.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    if host == "docker":
        refused = run()
        assert (refused.returncode, "put the wheel here first: pip wheel" in refused.stderr) == (1, True)
        (tmp_path / "out" / "wheels").mkdir()
        (tmp_path / "out" / "wheels" / "flamingo_export-1-py3-none-any.whl").touch()
    done = run()
    assert done.returncode == 0, done.stderr
    calls = [line.partition("|")[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call.replace(str(bundle.resolve()), "BUNDLE") for call in calls] == expected
    if host == "docker":
        assert (tmp_path / "calls").read_text().endswith(f"|{bundle.resolve()}\n")


def test_no_bundle_is_copied(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 50_000


@pytest.mark.parametrize(("host", "count"), [("kubernetes", 4), ("kserve", 2)])
def test_kubernetes_manifests_are_valid(bundle: Path, tmp_path: Path, host: str, count: int) -> None:
    """An InferenceService is none of Kubernetes' own kinds, but its predictor is a pod: that is checked as one."""
    package(bundle, host, tmp_path / "out")
    checked = 0
    for path, document in documents(tmp_path / "out"):
        if document["apiVersion"].startswith("serving.kserve.io"):
            own = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout"}
            spec = {name: value for name, value in document["spec"]["predictor"].items() if name not in own}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            continue
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"]), path
        checked += 1
    assert checked == count


@pytest.mark.parametrize("host", ["kubernetes", "kserve"])
def test_containers_start_what_there_is(bundle: Path, tmp_path: Path, host: str) -> None:
    """Arguments are options of `serve`, probes its paths, and the grace period is longer than its drain."""
    package(bundle, host, tmp_path / "out")
    group: Any = typer.main.get_command(app)
    serve = group.commands["serve"]
    options = {option for parameter in serve.params for option in parameter.opts}
    for path, document in documents(tmp_path / "out"):
        spec = document["spec"]
        spec = spec.get("template", {}).get("spec") or spec.get("predictor") or spec
        for container in spec.get("containers", []):
            given = [argument for argument in container.get("args", []) if argument.startswith("--")]
            assert set(given) <= options, path
            if "--drain" in given:
                drain = int(container["args"][container["args"].index("--drain") + 1])
                assert spec["terminationGracePeriodSeconds"] > drain
            for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["path"] in ("/health/ready", "/health/live")


def test_the_dashboard_asks_for_metrics_that_the_server_has(bundle: Path, tmp_path: Path) -> None:
    package(bundle, "docker", tmp_path / "out")
    text = (tmp_path / "out" / "dashboard.json").read_text(encoding="utf-8")
    asked = set(re.findall(r"flamingo_[a-z_]+", json.dumps([panel["targets"] for panel in json.loads(text)["panels"]])))
    source = (Path(flamingo_export.__file__).parent / "serve" / "metrics.py").read_text(encoding="utf-8")
    known = set(re.findall(r'"(flamingo_[a-z_]+)"', source))
    assert asked
    for name in asked:
        assert any(name in (metric, f"{metric}_total", f"{metric}_bucket") for metric in known), name


def test_dockerfiles_install_extras_that_there_are(bundle: Path, tmp_path: Path) -> None:
    import tomllib

    root = Path(__file__).resolve().parents[2]
    extras = set(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])
    package(bundle, "docker", tmp_path / "out")
    for name in ("Dockerfile", "Dockerfile.cuda"):
        found = re.search(r"\.whl\)\[([a-z,]+)\]", (tmp_path / "out" / name).read_text(encoding="utf-8"))
        assert found
        assert set(found[1].split(",")) <= extras


def test_memory_follows_the_bundle(bundle: Path, tmp_path: Path) -> None:
    package(bundle, "kubernetes", tmp_path / "out")
    (deployment,) = [document for _, document in documents(tmp_path / "out") if document["kind"] == "Deployment"]
    assert deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "3Gi"


def test_refusals(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="docker, kubernetes, kserve, ray, triton"):
        package(bundle, "moon", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(BuildError, match="not an empty folder"):
        package(bundle, "docker", tmp_path / "full")
    with pytest.raises(BundleError):
        package(tmp_path / "none", "docker", tmp_path / "out")
    for name in ('a"b', "a$(b)", "a\nb"):
        renamed = tmp_path / "renamed" / f"{name}.bundle"
        shutil.copytree(bundle, renamed)
        with pytest.raises(BuildError, match="Rename"):
            package(renamed, "docker", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(["package", str(bundle), "--for", "docker", "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "compose.yaml") in capsys.readouterr().out


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("empty", [False, True])
def test_a_full_disk_leaves_no_half_of_a_folder(
    bundle: Path, tmp_path: Path, host: str, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command then finds the place as it was; what is left of a half would be refused as a folder of somebody's, or used."""
    out, left = tmp_path / "new" / "out", [3]

    def until_full(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        path.write_bytes(data)

    if empty:
        out.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("flamingo_export.deploy.package.write_atomically", until_full)
        with pytest.raises(OSError, match="No space left"):
            package(bundle, host, out)
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.is_file() for path in package(bundle, host, out))
