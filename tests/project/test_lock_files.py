"""The lock files follow pyproject.toml, for every Python that they are for, and hold hashes and nothing of the machine that made them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NOT_LOCKED = {"torch", "torchvision"}
LOCKED_EXTRAS = {
    name: re.findall(r"--extra (\w+)", arguments)
    for arguments, name in re.findall(r"(?s)\$\(COMPILE\)(.*?)-o requirements/(\w+)\.txt", MAKEFILE)
    if name in ("base", "dev")
}
"""By lock file, as `make lock` resolves it."""
ELSEWHERE = {"gpu", "tensorrt", "tensorrt-cu12", "rtx", "torch", "transformers", "report", "ray", "otel"}
"""Extras for machines with a GPU, of torch, without a package, and of requirements/ray.txt."""
HOSTS = ("ray", "triton", "kserve")
"""Environments of their own, for Linux."""
PLATFORMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}


def group(name: str) -> list[str]:
    """Requirements of a dependency group, its included groups among them."""
    found: list[str] = []
    for entry in PYPROJECT["dependency-groups"][name]:
        found += [entry] if isinstance(entry, str) else group(entry["include-group"])
    return found


def wanted(name: str) -> list[Requirement]:
    lines = [*PYPROJECT["project"]["dependencies"], *group({"base": "build", "dev": "dev"}[name])]
    lines += [line for extra in LOCKED_EXTRAS[name] for line in EXTRAS[extra]]
    return [found for found in map(Requirement, lines) if found.name not in NOT_LOCKED]


def text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")


def locked(name: str) -> list[tuple[Requirement, int]]:
    """Each locked package and how many hashes stand below it."""
    blocks = re.split(r"\n(?=[a-z0-9])", re.sub(r"(?m)^ *#.*\n", "", text(name)))
    return [(Requirement(block.split(" \\\n")[0]), block.count("--hash=sha256:")) for block in blocks if block.strip()]


def environment(python: str, platform: str) -> dict[str, Any]:
    here: dict[str, Any] = dict(default_environment())
    return here | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_system": PLATFORMS[platform],
    }


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", LOCKED_EXTRAS)
def test_every_requirement_is_locked_once_and_within_its_range(name, python, platform):
    there = [found for found, _ in locked(name) if not found.marker or found.marker.evaluate(environment(python, platform))]
    versions = {found.name: next(iter(found.specifier)).version for found in there}
    assert len(versions) == len(there), "one package, two versions"
    for requirement in wanted(name):
        assert requirement.name in versions, f"{requirement} is not in requirements/{name}.txt: make lock"
        assert versions[requirement.name] in requirement.specifier, (
            f"{requirement}, locked {versions[requirement.name]}: make lock"
        )


@pytest.mark.parametrize("name", [*LOCKED_EXTRAS, *HOSTS])
def test_everything_has_hashes_and_an_exact_version(name):
    found = locked(name)
    assert len(found) > 20
    assert all(hashes and [each.operator for each in package.specifier] == ["=="] for package, hashes in found)


@pytest.mark.parametrize("name", [*LOCKED_EXTRAS, *HOSTS])
def test_no_host_index_or_torch_in_a_lock(name):
    assert not re.search(r"://|--(?:extra-)?index|--find-links|^-", text(name), flags=re.MULTILINE)
    unwanted = [package.name for package, _ in locked(name) if re.match(r"torch|nvidia|triton|cuda", package.name)]
    assert unwanted == (["nvidia-pytriton", "tritonclient"] if name == "triton" else [])


@pytest.mark.parametrize("name", ["ray", "triton"])
def test_hosts_are_locked_with_what_the_package_needs(name):
    there = {found.name: next(iter(found.specifier)).version for found, _ in locked(name)}
    lines = [*PYPROJECT["project"]["dependencies"], *group(name), *EXTRAS["cpu"], *EXTRAS.get(name, [])]
    for requirement in map(Requirement, lines):
        assert there[requirement.name] in requirement.specifier, f"{requirement}: make lock"


def test_every_extra_is_locked():
    assert LOCKED_EXTRAS["base"] == ["cpu"]
    assert set(LOCKED_EXTRAS["dev"]) == EXTRAS.keys() - ELSEWHERE


def test_the_demo_and_the_tests_run_on_the_same_versions():
    base, dev = ({(package.name, str(package.specifier)) for package, _ in locked(name)} for name in ("base", "dev"))
    assert base <= dev


def test_torch_has_one_exact_version():
    made = re.search(r"^TORCH := (\S+)$", MAKEFILE, flags=re.MULTILINE)
    assert made
    assert {line for lines in EXTRAS.values() for line in lines if line.startswith("torch")} == {made[1]}


def test_the_makefile_installs_by_exact_version_and_hash():
    """torch first, then the lock, then the package itself, each without its dependencies."""
    assert "LOCKED := --require-hashes --no-deps\n" in MAKEFILE
    assert re.search(r"^THIS := --no-deps --no-build-isolation -e \.$", MAKEFILE, flags=re.MULTILINE)
    for target, wanted in (
        ("installed", ["$(LOCKED) -r requirements/base.txt", "$(THIS)"]),
        ("installed-dev", ["$(TORCH)", "$(LOCKED) -r requirements/dev.txt", "$(THIS)"]),
    ):
        rule = re.search(rf"(?m)^\.venv/{target}:.*\n((?:\t.*\n)+)", MAKEFILE)
        assert rule
        assert re.findall(r"\$\(INSTALL\) (.+)", rule[1]) == wanted


def test_lowest_versions_that_the_code_names_are_those_of_the_extras():
    from flamingo_export.backends import onnxruntime_library
    from flamingo_export.backends.tensorrt import cuda
    from flamingo_export.validate.expected.transformers import theirs

    assert EXTRAS["cpu"] == [f"onnxruntime>={onnxruntime_library.lowest()}"]
    assert f"onnxruntime-gpu>={onnxruntime_library.lowest()}" in EXTRAS["gpu"]
    assert set(EXTRAS["tensorrt"]) < set(EXTRAS["gpu"])  # cuda-bindings, for device memory
    (thirteen,), (twelve,) = EXTRAS["tensorrt"], EXTRAS["tensorrt-cu12"]
    assert f"pip install '{thirteen}', or for CUDA 12 pip install '{twelve}'" == cuda.INSTALL
    assert f"transformers>={theirs.LOWEST}" in EXTRAS["transformers"]


def test_onnx_runtime_comes_by_extra():
    base = {Requirement(line).name for line in PYPROJECT["project"]["dependencies"]}
    assert not [name for name in base if name.startswith("onnxruntime")]
    names = {extra: {Requirement(line).name for line in EXTRAS[extra]} for extra in ("cpu", "gpu")}
    assert names == {"cpu": {"onnxruntime"}, "gpu": {"onnxruntime-gpu", "cuda-bindings"}}
    assert "polygraphy" in {Requirement(line).name for line in EXTRAS["debug"]}
