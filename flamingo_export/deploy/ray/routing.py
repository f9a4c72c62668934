"""Which replica gets a request: the one that its beginning belongs to, as long as that has room."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from flamingo_export.deploy.ray.requests import ranked

_KEY = 3
"""Place of the key among the arguments of `Replica.answer`."""


class SameBeginningRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Ranks replicas by the request's key; one without goes to the less busy of two. Ray takes the first that has room."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the best first."""
        if not candidate_replicas:
            return []
        key = _key(pending_request)
        if not key:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        order = ranked(key, [replica.replica_id.unique_id for replica in candidate_replicas])
        return [[candidate_replicas[place]] for place in order]


def _key(pending: Any) -> str:
    if pending is None:
        return ""
    key = pending.args[_KEY] if len(pending.args) > _KEY else pending.kwargs.get("key", "")
    return key if isinstance(key, str) else ""
