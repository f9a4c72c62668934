"""What the operator decides: `settings.json` of the generated folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.errors import InputError
from flamingo_export.serve.held import Limits


class RaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one application.

    model: the name that clients know the bundle by. host, port: where Ray's proxy listens.
    replicas_least, replicas_most: their number follows the requests under way where the two differ.
    replica_cpus, replica_gpus: of each; 0.5 GPUs put two replicas on one.
    rows: requests that a replica runs at once, None: as many as its engine has. target: requests under way of a replica, on average, that
    their number aims at. queue: requests that wait for a replica before more are refused.
    backend, device, threads: as `serve` has them.
    max_body: bytes of a request. held_requests, held_bytes: requests under way, and bytes of their bodies, that the proxy of a node and the
    ingress hold at most. timeout: seconds of a request. drain: seconds that a replica has to finish when it is taken out.
    api_key_file: keys that are let in, as `serve` has them. allow_media_from: origins of media.
    retries: times that a request is asked of another replica when its own died.
    dashboard: whether Ray's dashboard runs, on a loopback address.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    replicas_least: int = 2
    replicas_most: int = 2
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    rows: int | None = None
    target: float = 8.0
    queue: int = 64
    backend: str = "auto"
    device: str = "cpu"
    threads: int = 0
    max_body: int = 64 << 20
    held_requests: int = 1024
    held_bytes: int = 256 << 20
    timeout: float = 300.0
    drain: float = 120.0
    api_key_file: str | None = None
    allow_media_from: tuple[str, ...] = ()
    retries: int = 3
    dashboard: bool = False

    @property
    def limits(self) -> Limits:
        """What is held at once."""
        return Limits(body=self.max_body, requests=self.held_requests, bytes=self.held_bytes)


def read_settings(path: Path) -> RaySettings:
    """The settings of a file. Raises InputError naming what is wrong."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=RaySettings)
    except OSError as error:
        raise InputError(f"the settings in {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a settings file: {error}") from error
    faults = {
        "replicas_least and replicas_most": 1 <= found.replicas_least <= found.replicas_most,
        "replica_cpus and replica_gpus": found.replica_cpus >= 0 and found.replica_gpus >= 0,
        "rows": found.rows is None or found.rows >= 1,
        "target, timeout and max_body": found.target > 0 and found.timeout > 0 and found.max_body > 0,
        "queue, drain and retries": found.queue >= 0 and found.drain >= 0 and found.retries >= 0,
        "held_requests and held_bytes": found.held_requests >= 1 and found.held_bytes >= found.max_body,
        "port": 1 <= found.port <= 65535,
    }
    for name, right in faults.items():
        if not right:
            raise InputError(f"{path}: {name} do not make sense. See docs/scaling.md for what they are.")
    return found
