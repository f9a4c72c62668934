"""`flamingo-export package`: a folder that runs a bundle in containers or on another host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def package(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle. It is read for its name and size, and not copied.", show_default=False)
    ],
    host: Annotated[
        str,
        typer.Option("--for", metavar="docker|kubernetes|kserve|ray|triton", help="Where it shall run.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; missing or empty.", show_default=False)],
) -> None:
    """Write what runs a bundle elsewhere: Dockerfiles and compose with Prometheus and Grafana, manifests for Kubernetes or KServe, replicas on
    Ray Serve, or a model repository for Triton.

    \b
    flamingo-export package nano.bundle --for docker --out deploy/
    deploy/run nano.bundle
    """
    from flamingo_export.cli.output import remarks
    from flamingo_export.deploy.package import package as write

    for path in write(bundle, host, out):
        print(path)
    remarks().print(f"Next: {out / 'README.md'}", markup=False)
