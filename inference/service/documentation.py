"""What /docs and /openapi.json say: the requests' models, and every status that can come; without foreign files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastapi_swagger
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse, Response
from pydantic import BaseModel

from inference.service.errors import ApiError, ErrorResponse

ALWAYS = (401, 405, 429, 500, 503)
WITH_BODY = (400, 408, 413, 415)
REASONS = {
    400: "The body is not JSON, or not a request that can be answered.",
    401: "The service has keys, and none of them was shown.",
    403: "The service takes no such request.",
    404: "There is no such model.",
    405: "The path has other methods.",
    408: "The body arrived too slowly.",
    409: "Another request of this kind is going on.",
    413: "The body is too large.",
    415: "The body is said to be something else than JSON.",
    422: "The body is JSON, but not a request that can be answered.",
    429: "Too many requests wait, or too many came with this key; Retry-After says when to come back.",
    500: "The computation failed.",
    503: "The model is being loaded, or the service stops; Retry-After says when to come back.",
}
MODELS: dict[str, type[BaseModel]] = {}  # of requests' bodies, which are read without FastAPI

router = APIRouter(include_in_schema=False)
FILES = Path(fastapi_swagger.__file__).parent / "resources"
SHOWN_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>GPT generation service</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});\n'
ONLY_OWN_FILES = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


def described(*statuses: int, body: type[BaseModel] | None = None, streams: bool = False) -> dict[str, Any]:
    """What a route says of itself: arguments of FastAPI's decorators.

    Args:
        statuses: of errors, besides those that come with every route, or with every body.
        body: the model of its body.
        streams: whether it can answer with server-sent events.
    """
    listed = sorted({*ALWAYS, *statuses, *(WITH_BODY if body else ())})
    responses: dict[int, Any] = {status: {"model": ErrorResponse, "description": REASONS[status]} for status in listed}
    if streams:
        event = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON, or [DONE]"}}}
        responses[200] = {"content": {"text/event-stream": {"schema": event}}}
    if body is None:
        return {"responses": responses}
    MODELS[body.__name__] = body
    reference = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}, "example": body.shown}
    return {
        "responses": responses,
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": reference}}},
    }


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = schema.setdefault("components", {})
        for name, model in MODELS.items():
            content = model.model_json_schema(ref_template="#/components/schemas/{model}")
            components["schemas"] |= {**content.pop("$defs", {}), name: content}
        for path in schema["paths"].values():  # FastAPI's own shape of error, which its parameters would have
            for operation in path.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{}, {"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema


@router.get("/docs")
async def docs() -> HTMLResponse:
    """The documentation, as a page to try the service on; all of its files come from here."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": ONLY_OWN_FILES})


@router.get("/docs/{name}")
async def docs_file(name: str) -> Response:
    """A file of that page: Swagger UI, which the package fastapi-swagger brings along."""
    if name == "start.js":
        return Response(START, media_type="text/javascript")
    if name not in SHOWN_FILES:
        raise ApiError(404, f"there is no file {name[:80]!r}; see /docs")
    return FileResponse(FILES / name)

