"""Starts the Triton server that is there: NVIDIA's, or the one in pytriton's wheel.

python -m flamingo_export.deploy.triton.start BUNDLE --repository repository/
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.deploy.triton.backend import BUNDLE
from flamingo_export.errors import BackendError, FlamingoExportError

_STUB = "triton_python_backend_stub"


def server() -> tuple[Path, Path | None]:
    """The program, and its folder of backends where that is not the usual one. Raises BackendError where there is none."""
    found = shutil.which("tritonserver")
    if found is not None:
        return Path(found), None
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise BackendError(
            "there is no tritonserver on PATH. Use NVIDIA's container (25.07 or later), or an environment with nvidia-pytriton "
            "(docs/scaling.md)."
        )
    if int(version("numpy").partition(".")[0]) > 1:
        raise BackendError(
            f"numpy is {version('numpy')}; the Python backend of pytriton's server dies with it at the first request. "
            "Make an environment for it: pip install nvidia-pytriton==0.7.0 numpy==1.26.4"
        )
    home = Path(spec.origin).parent / "tritonserver"
    return home / "bin" / "tritonserver", _with_stub(home)


def _with_stub(home: Path) -> Path:
    """A folder of backends whose Python backend has the stub of this Python version beside it, as the server looks for it."""
    name = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / name / _STUB
    if not stub.exists():
        offered = ", ".join(sorted(path.name for path in (home / "python_backend_stubs").iterdir()))
        raise BackendError(f"pytriton {_pytriton()} has no stub for Python {name}. Use one of {offered}.")
    folder = Path(tempfile.mkdtemp(prefix="flamingo-triton-"))
    (folder / "python").mkdir()
    # Links, not copies: the programs look for their libraries from where they really are.
    for file in (home / "backends" / "python").iterdir():
        if file.is_file():
            (folder / "python" / file.name).symlink_to(file)
    (folder / "python" / _STUB).symlink_to(stub)
    return folder


def _pytriton() -> str:
    try:
        return distribution("nvidia-pytriton").version
    except PackageNotFoundError:
        return "of an unknown version"


def command(program: Path, backends: Path | None, repository: Path, http: int, grpc: int, metrics: int) -> list[str]:
    """The server's arguments: loopback only; shared memory and the model repository need a header that nobody can send.

    The server takes that header from its arguments only, where every user of the machine reads it (`ps`). So it is one that the protocols
    do not carry: a value in two lines, which no header of HTTP has, under a name with capitals, which HTTP/2 refuses.
    """
    key = f"Closed={secrets.token_hex(16)}\n{secrets.token_hex(16)}"
    return [
        str(program),
        f"--model-repository={repository}",
        *([f"--backend-directory={backends}"] if backends is not None else []),
        "--http-address=127.0.0.1",
        f"--http-port={http}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics}",
        "--model-control-mode=none",
        "--strict-readiness=true",
        "--exit-on-error=true",
        "--exit-timeout-secs=120",
        f"--http-restricted-api=shared-memory,model-repository,trace,logging:{key}",
        f"--grpc-restricted-protocol=shared-memory,model-repository,trace,logging:{key}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Becomes the server. Returns 1 where it cannot."""
    parser = argparse.ArgumentParser(prog="run", description="Starts Triton Inference Server over a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    asked = parser.parse_args(arguments)
    try:
        read_manifest(asked.bundle)
        program, backends = server()
    except FlamingoExportError as error:
        print(f"run: {error}", file=sys.stderr)
        return 1
    environment = {**os.environ, BUNDLE: str(asked.bundle.resolve())}
    if backends is not None:
        # Its stub takes its packages from the first python3 on PATH.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    line = command(program, backends, asked.repository.resolve(), asked.http_port, asked.grpc_port, asked.metrics_port)
    os.execve(line[0], line, environment)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
