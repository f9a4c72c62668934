"""Triton's Python backend finds this class; what it does is in the package."""

import json
from typing import Any

import triton_python_backend_utils as triton

from flamingo_export.deploy.triton.backend import Requests


class TritonPythonModel:
    """Hands requests to the engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Triton is ready when this returns: a request was answered."""
        self.requests = Requests(triton)
        self.requests.open(json.loads(args["model_config"])["parameters"])

    def execute(self, requests: list[Any]) -> None:
        """Answers come later, by the requests' own senders."""
        self.requests.take(requests)

    def finalize(self) -> None:
        """The end."""
        self.requests.close()
