"""The API's description, made from the types that its bodies are read into."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import msgspec

from flamingo_export.serve.bodies import Chat, Completion, Scored

_ERRORS = {
    "400": "A request that cannot be carried out.",
    "401": "No API key, or an unknown one.",
    "404": "No such model.",
    "413": "A body or medium that is too large.",
    "422": "A field of the wrong type.",
    "429": "The queue is full, or the caller has too many requests under way.",
    "503": "The server is stopping, the bundle is being exchanged, the deadline passed, memory is short, or the GPU is lost.",
}


def description() -> dict[str, Any]:
    """OpenAPI 3.1."""
    (chat, completion, scored), components = msgspec.json.schema_components(
        (Chat, Completion, Scored), ref_template="#/components/schemas/{name}"
    )
    error = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }

    def posted(summary: str, body: Any) -> dict[str, Any]:
        answers: dict[str, Any] = {"200": {"description": "The answer, or a stream of server-sent events."}}
        for status, text in _ERRORS.items():
            answers[status] = {"description": text, "content": {"application/json": {"schema": error}}}
        content = {"application/json": {"schema": body}}
        return {"post": {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": answers}}

    def read(summary: str) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": {"description": "What was asked for."}}}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "flamingo-export", "version": version("flamingo-export")},
        "paths": {
            "/v1/chat/completions": posted("Answer a conversation about images and videos.", chat),
            "/v1/completions": posted("Go on with a raw prompt, or give its own log-probabilities.", completion),
            "/v1/score": posted("Log-likelihood of candidate answers.", scored),
            "/v1/models": read("The models that are served."),
            "/health/live": read("Whether the process runs."),
            "/health/ready": read("Whether it takes requests."),
            "/metrics": read("Prometheus metrics."),
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
