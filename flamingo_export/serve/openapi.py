"""The API's description, made from the types that its bodies are read into: for programs, and as a page."""

from __future__ import annotations

import json
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


def page() -> str:
    """The description as HTML."""
    from flamingo_export.pages.template import render

    found = description()
    routes = []
    for path, methods in found["paths"].items():
        ((method, route),) = methods.items()
        body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
        routes.append({"method": method.upper(), "path": path, "summary": route["summary"], "body": body.rpartition("/")[2]})
    types = {name: _fields(schema) for name, schema in found["components"]["schemas"].items()}
    return render(__package__, "api.html.j2", routes=routes, types=list(types.items()), refusals=list(_ERRORS.items()))


def _fields(schema: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each field of an object."""
    rows = []
    for name, kind in schema["properties"].items():
        default = "refused" if name in schema.get("required", ()) else _said(kind.get("default"))
        rows.append({"name": name, "type": _type(kind), "default": default})
    return rows


def _said(default: Any) -> str:
    return "" if default is None else json.dumps(default)


def _type(schema: dict[str, Any]) -> str:
    """What a field may hold, in words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_type(kind) for kind in schema["anyOf"] if kind.get("type") != "null")
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    if schema.get("type") == "array":
        kind = _type(schema["items"]) if schema.get("items") else "anything"
        return f"list of ({kind})" if " or " in kind else f"list of {kind}"
    return {"object": "object", "string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}.get(
        schema.get("type", ""), "anything"
    )
