"""`flamingo-export serve`: bundles behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_export.cli.groups import Running

if TYPE_CHECKING:
    from flamingo_export.runtime.model import Model
    from flamingo_export.serve.settings import ModelChoice


def serve(
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Bundles; each is served under its folder's name.", show_default=False)
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME=BUNDLE", help="A bundle under another name; repeat for more.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="Keys that are let in: a line per KEY or NAME KEY.", show_default=False
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Requests that run at once, per model. Default 16.", show_default=False)
    ] = None,
    max_queue: Annotated[int, typer.Option("--max-queue", min=0, help="Requests that wait beside them.")] = 64,
    max_per_caller: Annotated[
        int | None,
        typer.Option(
            "--max-per-caller", min=1, help="Requests that one caller has under way. Default any number.", show_default=False
        ),
    ] = None,
    allow_media_from: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-media-from",
            metavar="ORIGIN",
            help="Fetch media from URLs of this origin; repeat for more. Default: data: URLs only.",
            show_default=False,
        ),
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Largest body, in MiB.")] = 64,
    held_requests: Annotated[
        int, typer.Option("--held-requests", min=1, help="Requests that are read or answered at once, of all models.")
    ] = 1024,
    held_bodies: Annotated[
        int | None,
        typer.Option(
            "--held-bodies", min=1, help="Bodies of these together, in MiB. Default four times --max-body.", show_default=False
        ),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that a request may take.")] = 300.0,
    drain: Annotated[
        float, typer.Option("--drain", min=0.0, help="Seconds that accepted requests have after SIGTERM.")
    ] = 120.0,
    trace_to: Annotated[
        str | None,
        typer.Option(
            "--trace-to",
            metavar="URL",
            help="OpenTelemetry collector, OTLP over HTTP: http://127.0.0.1:4318.",
            show_default=False,
        ),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write the bodies of requests to the log.")] = False,
    run: Running = Running(),
) -> None:
    """Serve bundles over HTTP: OpenAI's API, a web page at /, metrics at /metrics.

    \b
    flamingo-export serve nano.bundle
    curl -s localhost:8000/v1/models
    """
    from flamingo_export.cli.output import remarks
    from flamingo_export.errors import BackendError
    from flamingo_export.serve.settings import ServeSettings

    try:
        import uvicorn  # noqa: F401

        from flamingo_export.serve.app import Server, fetcher_of
        from flamingo_export.serve.models import Models, named
        from flamingo_export.serve.process import bound, set_up_logs
        from flamingo_export.serve.process import serve as run_server
        from flamingo_export.serve.tracing import traced_to
    except ImportError as error:
        raise BackendError(f"serving needs {error.name}: pip install '.[serve]' (docs/serving.md)") from error
    from flamingo_export.serve.access import read_keys

    choices = chosen(bundles or [], names or [])
    named(choices)
    settings = ServeSettings(
        host=host,
        port=port,
        rows=rows,
        max_queue=max_queue,
        max_per_caller=max_per_caller,
        max_body=max_body << 20,
        held_requests=held_requests,
        held_bytes=(held_bodies or 4 * max_body) << 20,
        allow_media_from=tuple(allow_media_from or ()),
        timeout=timeout,
        drain_seconds=drain,
        log_prompts=log_prompts,
        keys=read_keys(api_key_file) if api_key_file is not None else {},
    )

    def load(choice: ModelChoice) -> Model:
        import flamingo_export

        return flamingo_export.load(
            choice.bundle,
            backend=run.backend,
            device=run.device,
            threads=run.threads,
            fallback=run.fallback,
            rows=rows,
            queue=max_queue,
        )

    fetcher, sockets = fetcher_of(settings), bound(host, port)
    models = Models(choices, load)
    for served in models:
        remarks().print(f"{served.name}: {served.model.backend.name}, {served.model.engine.rows} rows")
    remarks().print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    set_up_logs()
    with traced_to(trace_to) as tracing:
        code = run_server(Server(models, settings, fetcher=fetcher, tracing=tracing), sockets)
    if code:
        raise typer.Exit(code)


def chosen(bundles: list[Path], names: list[str]) -> list[ModelChoice]:
    """The bundles with their names: the folder's without `.bundle`, or what --name says."""
    from flamingo_export.serve.settings import ModelChoice

    found = [ModelChoice(name=path.resolve().name.removesuffix(".bundle"), bundle=path) for path in bundles]
    for text in names:
        name, equals, path = text.partition("=")
        if not (equals and name.strip() and path):
            raise typer.BadParameter(f"{text!r} is not NAME=BUNDLE", param_hint="--name")
        found.append(ModelChoice(name=name.strip(), bundle=Path(path)))
    return found
