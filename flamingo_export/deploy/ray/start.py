"""Deploys replicas and ingress, on a cluster that runs already or on this machine.

    python -m flamingo_export.deploy.ray.start BUNDLE --settings settings.json

The first call starts the application and stays; SIGTERM or Ctrl-C ends it. Called again while it runs, with the same bundle or another one,
it replaces the replicas one after the other and returns: requests under way end on the old ones.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flamingo_export.bundle.identity import bundle_digest
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.deploy.ray.bounds import CALLBACK, LIMITS
from flamingo_export.deploy.ray.failures import reason_of
from flamingo_export.deploy.ray.ingress import Ingress, Lost, Overloaded
from flamingo_export.deploy.ray.settings import RaySettings, read_settings
from flamingo_export.errors import BackendError, FlamingoExportError, InputError
from flamingo_export.runtime.engine import DEFAULT_ROWS
from flamingo_export.serve.held import Limits

APPLICATION = "flamingo"
_ENVIRONMENT = {
    # Ray reports what runs where to its makers, unless it is asked not to.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Its own ports listen on all addresses, and run programs for who speaks to them: they ask for a token (~/.ray/auth_token).
    "RAY_AUTH_MODE": "token",
    # A machine under load starts Ray's processes late.
    "RAY_agent_register_timeout_ms": "200000",
    "RAY_raylet_start_wait_time_s": "240",
    CALLBACK: "flamingo_export.deploy.ray.bounds:middlewares",
}
_SECRET = re.compile(rb"[0-9a-f]{64}")
_SPARE = 4
"""Requests that a replica is given beside its rows, so that the next one is there when a row is free."""


def prepare_environment(limits: Limits | None = None) -> None:
    """Before Ray is imported. limits: what the proxies of a cluster hold that is started here."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if limits is not None:
        os.environ[LIMITS] = msgspec.json.encode(limits).decode()


def connect(*, dashboard: bool = False, limits: Limits | None = None) -> bool:
    """Connects to the cluster of RAY_ADDRESS or of this machine, or starts one here. True: it was started.

    limits: what its proxies hold. Raises BackendError where Ray is not installed, or a cluster does not let us in.
    """
    prepare_environment(limits)
    try:
        import ray
    except ImportError as error:
        raise BackendError("this needs Ray: pip install '.[cpu,serve,ray]' (docs/scaling.md)") from error
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, namespace=APPLICATION)
    except (ConnectionError, RuntimeError) as error:
        if "RAY_ADDRESS" in os.environ or "Could not find any running Ray instance" not in str(error):
            raise BackendError(
                f"a cluster runs at {os.environ.get('RAY_ADDRESS', 'this machine')} and does not let this process in: {error}. "
                "Its token is in ~/.ray/auth_token of who started it, or in RAY_AUTH_TOKEN."
            ) from error
        ray.init(
            _node_ip_address="127.0.0.1",
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            namespace=APPLICATION,
        )
        return True
    return False


def application(bundle: Path, settings: RaySettings, secret: str) -> Any:
    """The Serve application: an ingress bound to replicas."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from flamingo_export.deploy.ray.replica import Replica

    rows = settings.rows or DEFAULT_ROWS
    number: dict[str, Any] = {"num_replicas": settings.replicas_least}
    if settings.replicas_most > settings.replicas_least:
        number = {
            "autoscaling_config": {
                "min_replicas": settings.replicas_least,
                "max_replicas": settings.replicas_most,
                "target_ongoing_requests": settings.target,
                "upscale_delay_s": 5,
                "downscale_delay_s": 120,
            }
        }
    replica = serve.deployment(
        name="Replica",
        max_ongoing_requests=rows + _SPARE,
        max_queued_requests=settings.queue,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain,
        request_router_config=RequestRouterConfig(
            request_router_class="flamingo_export.deploy.ray.routing.SameBeginningRouter"
        ),
        **number,
    )(Replica)
    front = serve.deployment(
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain,
    )(Front)
    packed = msgspec.json.encode(settings)
    digest = bundle_digest(read_manifest(bundle))
    return front.bind(replica.bind(str(bundle.resolve()), digest, packed, secret), packed, secret)


class Front:
    """The ingress as a deployment of Ray's."""

    def __init__(self, replicas: Any, settings: bytes, secret: str) -> None:
        self._handle = replicas.options(stream=True)
        self._secret = secret
        self._ingress = Ingress(self._ask, msgspec.json.decode(settings, type=RaySettings))

    async def __call__(self, request: Any) -> Any:
        """A client's request."""
        return await self._ingress.respond(request)

    async def _ask(self, scope: dict[str, Any], body: bytes, key: str) -> AsyncIterator[Any]:
        from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
        from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

        response = self._handle.answer.remote(self._secret, scope, body, key)
        ended = False
        try:
            async for piece in response:
                yield piece
            ended = True
        except BackPressureError as error:
            ended = True
            raise Overloaded from error
        except (RayActorError, WorkerCrashedError, NodeDiedError, ReplicaUnavailableError) as error:
            ended = True
            raise Lost from error
        finally:
            if not ended:  # the client has gone
                response.cancel()


def secret_beside(settings: Path) -> str:
    """What replicas know their ingress by: made once and kept beside the settings, so that old and new replicas share it in an exchange.

    Raises InputError for a file that was cut: with an empty secret replicas would answer anybody.
    """
    path = settings.with_name("secret")
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    found = path.read_bytes()
    if not _SECRET.fullmatch(found):
        raise InputError(f"{path} is not a secret of this program. Remove it while nothing runs, and start again.")
    return found.decode()


def deploy(bundle: Path, settings: RaySettings, secret: str) -> None:
    """Starts the application on the connected cluster, or replaces its replicas. Raises BackendError where replicas do not start."""
    from ray import serve

    serve.start(http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(application(bundle, settings, secret), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        found = serve.status().applications.get(APPLICATION)
        said = [each.message for each in found.deployments.values() if "FAILED" in each.status] if found is not None else []
        raise BackendError(f"replicas do not start: {reason_of(said[0] if said else str(error))}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="run", description="Starts or updates replicas of a bundle on Ray Serve.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--settings", type=Path, required=True)
    asked = parser.parse_args(arguments)
    try:
        settings = read_settings(asked.settings)
        open_bundle(asked.bundle)  # before a running one is touched
        secret = secret_beside(asked.settings)
        owner = connect(dashboard=settings.dashboard, limits=settings.limits)
    except FlamingoExportError as error:
        print(f"run: {error}", file=sys.stderr)
        return 1
    import ray
    from ray import serve

    stopped = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stopped.set())
    try:
        deploy(asked.bundle, settings, secret)
    except BackendError as error:
        print(f"run: {error}", file=sys.stderr)
        if owner:
            serve.shutdown()
            ray.shutdown()
        return 1
    print(f"http://{settings.host}:{settings.port}", flush=True)
    if not owner:
        return 0
    stopped.wait()
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
