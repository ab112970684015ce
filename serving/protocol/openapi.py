"""The OpenAPI 3.1 document of a service: every route, for every model it serves.

Each model has paths of its own rather than one `{name}` for all, so that its schema is exactly that of its
inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from cluster.signature import Signature
from serving.protocol import schemas
from serving.protocol.examples import infer_example, predict_example
from serving.protocol.limits import Limits
from serving.protocol.schemas import Schema
from serving.protocol.terms import DEFAULT, HIGHEST, LOWEST, PRIORITY_HEADER, TIMEOUT_HEADER

_STATUS_TEXTS = {
    400: "the request can't be read",
    401: "a key is needed, and none that is valid was sent",
    404: "no such model or version",
    405: "another method than this route has",
    408: "the body did not arrive in time",
    413: "over a limit",
    415: "a content type or encoding that is not taken",
    422: "well-formed, but not what the model takes",
    429: "over the limits of the key's tenant; retry after the time given",
    500: "the server failed",
    503: "not ready, or too much to do; retry after the time given",
    504: "the request's time ran out",
}
_READ_STATUSES = (401, 404, 405, 429, 500, 503)
_RUN_STATUSES = (400, 401, 404, 405, 408, 413, 415, 422, 429, 500, 503, 504)
_METRICS_TYPE = "text/plain"


def openapi(models: Sequence[tuple[str, Signature]], limits: Limits | None = None) -> dict[str, Any]:
    """The document, ready for JSON. `models` are the names and signatures served."""
    paths: dict[str, Any] = _server_paths()
    component_schemas = dict(_SHARED_SCHEMAS)
    for name, signature in models:
        paths |= _model_paths(name, signature)
        component_schemas |= {
            f"{name}.InferRequest": schemas.infer_request(signature, limits or Limits()),
            f"{name}.InferResponse": schemas.infer_response(signature),
            f"{name}.PredictRequest": schemas.predict_request(signature, limits or Limits()),
            f"{name}.PredictResponse": schemas.predict_response(signature),
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tandem",
            "version": version("tandem-ray"),
            "description": "Models over the Open Inference Protocol v2, and over plain JSON for people.",
        },
        "paths": paths,
        # Optional: services that listen on loopback only ask for no key.
        "security": [{}, {"bearer": []}, {"api-key": []}],
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "schemas": component_schemas,
            "responses": {f"Error{status}": _error_response(status) for status in _STATUS_TEXTS},
        },
    }


def _server_paths() -> dict[str, Any]:
    return {
        "/v2": _get("server_metadata", "The server's name, version and extensions", "ServerMetadata"),
        "/v2/health/live": _get("server_live", "Whether the server runs"),
        "/v2/health/ready": _get("server_ready", "Whether every model can answer"),
        "/metrics": _get("metrics", "Figures for Prometheus", media_type=_METRICS_TYPE),
        "/openapi.json": _get("openapi", "This document", media_type="application/json"),
    }


def _model_paths(name: str, signature: Signature) -> dict[str, Any]:
    version_parameter = {
        "name": "version",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": "^[0-9]{1,9}$"},
    }
    paths: dict[str, Any] = {}
    for part, suffix in (("", ""), ("/versions/{version}", "_version")):
        base, tag = f"/v2/models/{name}{part}", f"{name}{suffix}"
        routes = {
            base: _get(f"{tag}.metadata", f"Inputs, outputs and versions of {name}", "ModelMetadata"),
            f"{base}/ready": _get(f"{tag}.ready", f"Whether {name} can answer"),
            f"{base}/infer": {"post": _infer_operation(name, signature, f"{tag}.infer")},
        }
        for route in routes.values():
            if part:
                route["parameters"] = [version_parameter]
        paths |= routes
    paths[f"/v1/models/{name}:predict"] = {"post": _predict_operation(name, signature)}
    paths[f"/v1/models/{name}:feedback"] = {"post": _feedback_operation(name)}
    return paths


def _infer_operation(name: str, signature: Signature, operation_id: str) -> dict[str, Any]:
    told = "JSON, then the bytes of the binary tensors; Inference-Header-Content-Length bytes are JSON"
    binary = {"schema": {"description": told, "contentMediaType": "application/octet-stream"}}
    request = _ref(f"{name}.InferRequest") | _example(infer_example(signature))
    response = {"application/json": _ref(f"{name}.InferResponse"), "application/octet-stream": binary}
    return {
        "operationId": operation_id,
        "summary": f"Run {name}: Open Inference Protocol v2",
        "parameters": _TERMS,
        "requestBody": {
            "required": True,
            "content": {"application/json": request, "application/octet-stream": binary},
        },
        "responses": {"200": _answer(response), **_errors(_RUN_STATUSES)},
    }


def _predict_operation(name: str, signature: Signature) -> dict[str, Any]:
    has_image = any(tensor.encoding for tensor in signature.inputs)
    request = _ref(f"{name}.PredictRequest") | _example(predict_example(signature))
    content: dict[str, Any] = {"application/json": request}
    if has_image:
        content |= {"image/png": {}, "image/jpeg": {}}
    return {
        "operationId": f"{name}.predict",
        "summary": f"Run {name} on plain JSON rows" + (" or an image file" if has_image else ""),
        "parameters": _TERMS,
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": _answer({"application/json": _ref(f"{name}.PredictResponse")}),
            **_errors(_RUN_STATUSES),
        },
    }


def _feedback_operation(name: str) -> dict[str, Any]:
    return {
        "operationId": f"{name}.feedback",
        "summary": f"Say how right answers of {name} were, so that a candidate is judged by it",
        "requestBody": {"required": True, "content": {"application/json": _ref("Feedback")}},
        "responses": {
            "202": _answer({"application/json": _ref("FeedbackCounted")}),
            **_errors(_RUN_STATUSES),
        },
    }


def _get(
    operation_id: str, summary: str, schema: str | None = None, *, media_type: str | None = None
) -> dict[str, Any]:
    success: dict[str, Any] = {"description": summary}
    if schema is not None:
        success["content"] = {"application/json": _ref(schema)}
    elif media_type is not None:
        success["content"] = {media_type: {}}
    responses = {"200": success, **_errors(_READ_STATUSES)}
    return {"get": {"operationId": operation_id, "summary": summary, "responses": responses}}


def _answer(content: dict[str, Any]) -> dict[str, Any]:
    headers = {
        "x-model-version": {"description": "the version that answered", "schema": {"type": "string"}},
        "x-request-id": {"description": "the id to find it by in the log", "schema": {"type": "string"}},
    }
    return {"description": "The model's outputs", "headers": headers, "content": content}


def _error_response(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": _STATUS_TEXTS[status],
        "content": {"application/json": _ref("Error")},
    }
    if status == 503:
        seconds = {"type": "integer", "minimum": 1}
        response["headers"] = {"retry-after": {"description": "seconds to wait", "schema": seconds}}
    return response


def _errors(statuses: Sequence[int]) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/Error{status}"} for status in statuses}


def _ref(schema: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{schema}"}}


def _example(value: dict[str, Any] | None) -> dict[str, Any]:
    return {} if value is None else {"example": value}


_TERMS = [
    {
        "name": TIMEOUT_HEADER.decode(),
        "in": "header",
        "description": "seconds within which the answer is of use; at most the service's own limit. In the"
        " Open Inference Protocol also the parameter timeout, in microseconds",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    {
        "name": PRIORITY_HEADER.decode(),
        "in": "header",
        "description": "1 is the highest, 3 the lowest; they share the model 16 : 4 : 1 where there isn't"
        " time for all. In the Open Inference Protocol also the parameter priority",
        "schema": {"type": "integer", "minimum": HIGHEST, "maximum": LOWEST, "default": DEFAULT},
    },
]
_TENSOR: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}},
        "parameters": {"type": "object"},
    },
    "required": ["name", "datatype", "shape"],
}
_FEEDBACK: Schema = {
    "type": "object",
    "properties": {
        "version": {"type": "string"},
        "score": {"type": "number", "minimum": -1e9, "maximum": 1e9},
        "prediction": {},
        "label": {},
    },
    "required": ["version"],
    "anyOf": [{"required": ["score"]}, {"required": ["prediction", "label"]}],
    "additionalProperties": False,
}
_SHARED_SCHEMAS: dict[str, Schema] = {
    "Error": {
        "type": "object",
        "properties": {
            "error": {"type": "string"},
            "details": {"type": "object", "additionalProperties": {"type": "string"}},
            "request_id": {"type": "string"},
        },
        "required": ["error", "request_id"],
    },
    "Feedback": {"anyOf": [_FEEDBACK, {"type": "array", "items": _FEEDBACK, "maxItems": 10_000}]},
    "FeedbackCounted": {
        "type": "object",
        "properties": {"counted": {"type": "integer"}},
        "required": ["counted"],
    },
    "ServerMetadata": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "version": {"type": "string"},
            "extensions": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "version", "extensions"],
    },
    "ModelMetadata": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"type": "string"},
            "inputs": {"type": "array", "items": _TENSOR},
            "outputs": {"type": "array", "items": _TENSOR},
        },
        "required": ["name", "platform", "inputs", "outputs"],
    },
}
