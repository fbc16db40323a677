"""The OpenAPI description of the server's HTTP interface, /openapi.json."""

from collections.abc import Mapping
from typing import Any

from ..command import version
from .models import Served
from .tensors import DATATYPES, FORMATS, MOST_OUTPUTS

ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string", "maxLength": 300}}}
# Status → what it means, of requests that carry an image.
PROBLEMS = {
    "400": "The request is wrong; the text says how.",
    "401": "The server has a token, and the request does not bear it.",
    "403": "A page of another site sent it.",
    "404": "No such model or version.",
    "408": "The body came too slowly.",
    "413": "The body, the image or what labelling it takes is over the server's limits.",
    "415": "A form, or a body that is packed otherwise than by gzip or deflate.",
    "422": "The image cannot be read, or the network does not run on it.",
    "503": "The queue or the disk is full, the server stops, or the network fails; Retry-After says when to ask again.",
    "504": "The request's time was over before it was run.",
}
PARAMETERS = {"type": "object", "additionalProperties": True}


def description(served: Mapping[str, Served]) -> dict[str, Any]:
    """OpenAPI 3.1 of a server of these models."""
    names = list(served)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": names}}
    number = {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}
    number["schema"]["enum"] = [each.version for each in served.values()]  # type: ignore[index]
    paths: dict[str, Any] = {
        "/v2": _look("server", "The server's name, version and models.", ("401",)),
        "/v2/health/live": _look("live", "Whether the server answers.", ()),
        "/v2/health/ready": _look("ready", "Whether requests should be sent to it.", ("503",)),
        "/metrics": _look("metrics", "Counters, as Prometheus reads them.", ("401",), "text/plain"),
        "/label": {"post": _label(names)},
    }
    for path, given in (("/v2/models/{name}", [name]), ("/v2/models/{name}/versions/{version}", [name, number])):
        end = "_version" if len(given) > 1 else ""
        paths[path] = _look(f"model{end}", "What a model takes and gives.", ("401", "404")) | {"parameters": given}
        paths[f"{path}/ready"] = _look(f"model_ready{end}", "Whether a model runs.", ("401", "404", "503")) | {
            "parameters": given
        }
        paths[f"{path}/infer"] = {"parameters": given, "post": _infer(f"infer{end}")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fcn-deploy", "version": version(), "description": "Labels for every pixel of an image."},
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR, "InferRequest": _request(), "InferResponse": _response()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _look(operation: str, summary: str, problems: tuple[str, ...], media: str = "application/json") -> dict[str, Any]:
    schema = {"type": "string"} if media == "text/plain" else {"type": "object"}
    answers = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
    for status in problems:
        # A network that is not ready is told as it is told ready.
        kind: dict[str, Any] = {"type": "object"} if status == "503" else {"$ref": "#/components/schemas/Error"}
        answers[status] = {"description": PROBLEMS[status], "content": {"application/json": {"schema": kind}}}
    return {"get": {"operationId": operation, "summary": summary, "responses": answers}}


def _answers(found: dict[str, Any]) -> dict[str, Any]:
    """The answers to a request that carries an image."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    problems = {status: {"description": text, "content": error} for status, text in PROBLEMS.items()}
    return {"200": {"description": "The results.", "content": found}, **problems}


def _infer(operation: str) -> dict[str, Any]:
    octets = {"schema": {"type": "string", "format": "binary"}}
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Length of the JSON in bytes, where binary data follow it.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 8_000_000},
    }
    return {
        "operationId": operation,
        "summary": "Results of one image, as the Open Inference Protocol has them.",
        "parameters": [header],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
                "application/octet-stream": octets,
            },
        },
        "responses": _answers(
            {
                "application/json": {"schema": {"$ref": "#/components/schemas/InferResponse"}},
                "application/octet-stream": octets,
            }
        ),
    }


def _label(names: list[str]) -> dict[str, Any]:
    def query(name: str, text: str, values: list[str] | None = None) -> dict[str, Any]:
        schema = {"type": "string"} | ({"enum": values} if values else {})
        return {"name": name, "in": "query", "description": text, "schema": schema}

    return {
        "operationId": "label",
        "summary": "An image file in; its labels as a palette PNG, or what each class has of it as JSON.",
        "parameters": [
            query("model", "Which model, where several are served.", names),
            query("version", "Its version, where it must be that one."),
            query("output", "What is wanted, if not what the network gives.", ["labels", "refined", "masks"]),
            query("page", "Which image of a file of several, from 0 on."),
            query("format", "`png`; `json`: pixels of each class; `rle`: run lengths too.", ["png", "json", "rle"]),
        ],
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        "responses": _answers(
            {
                "image/png": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {"schema": {"type": "object"}},
            }
        ),
    }  # fmt: skip


def _request() -> dict[str, Any]:
    shape = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 3}
    given = {
        "name": {"const": "image"},
        "datatype": {"enum": [*DATATYPES, "BYTES"]},
        "shape": shape | {"description": "[height, width, channels], or [1] of BYTES."},
        "parameters": PARAMETERS,
        "data": {"type": "array", "description": "Numbers, nested or flat; of BYTES an image file in base64."},
    }
    wanted = {
        "name": {"type": "string"},
        "parameters": PARAMETERS | {"properties": {"format": {"enum": list(FORMATS)}}},
    }
    inputs = _object(given, "name", "datatype", "shape")
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string", "maxLength": 1000},
            "parameters": PARAMETERS,
            "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": inputs},
            "outputs": {"type": "array", "maxItems": MOST_OUTPUTS, "items": _object(wanted, "name")},
        },
    }  # fmt: skip


def _response() -> dict[str, Any]:
    output = {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": PARAMETERS,
        "data": {"type": "array"},
    }
    return {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": PARAMETERS | {"description": "`pages` of a file of several images."},
            "outputs": {"type": "array", "items": _object(output, "name", "datatype", "shape")},
        },
    }


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}
