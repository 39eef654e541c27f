"""The OpenAPI document of the endpoint, made from the request types that check the bodies."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from prune2serve import __version__
from prune2serve.serve.protocol import ChatCompletionRequest, CompletionRequest

ERRORS = {
    "400": "The request does not fit.",
    "401": "The API key is missing or wrong.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "The queue is full; see Retry-After.",
    "503": "The engine is not ready.",
}


def document(*, needs_key: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document as an object."""
    kinds = (CompletionRequest, ChatCompletionRequest)
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    components: dict[str, Any] = {"schemas": {**schemas.get("$defs", {}), "Error": _error_schema()}}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "prune2serve", "version": __version__},
        "paths": {
            "/health": {"get": _operation("Whether the engine is ready.", errors=("503",), content=None)},
            "/version": {"get": _operation("The server's version.")},
            "/metrics": {"get": _operation("Prometheus metrics under vLLM's names.", content="text/plain")},
            "/v1/models": {"get": _operation("The served model and its names.", errors=("401",))},
            "/v1/completions": {"post": _post("Continue a prompt.", CompletionRequest.__name__)},
            "/v1/chat/completions": {"post": _post("Answer a conversation.", ChatCompletionRequest.__name__)},
        },
        "components": components,
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in made["paths"].items():
            if path.startswith("/v1"):
                for operation in methods.values():
                    operation["security"] = [{"key": []}]
    return made


def _post(summary: str, kind: str) -> dict[str, Any]:
    operation = _operation(summary, errors=tuple(ERRORS))
    schema = {"$ref": f"#/components/schemas/{kind}"}
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation["responses"]["200"]["content"]["text/event-stream"] = {}
    return operation


def _operation(
    summary: str, *, errors: tuple[str, ...] = (), content: str | None = "application/json"
) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    done: dict[str, Any] = {"description": "Done."} | ({"content": {content: {}}} if content else {})
    responses: dict[str, Any] = {"200": done}
    responses |= {status: {"description": ERRORS[status], "content": error} for status in errors}
    return {"summary": summary, "responses": responses}


def _error_schema() -> dict[str, Any]:
    text = {"type": "string"}
    maybe = {"type": ["string", "null"]}
    detail = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {"message": text, "type": text, "param": maybe, "code": maybe},
    }
    return {"type": "object", "required": ["error"], "properties": {"error": detail}}
