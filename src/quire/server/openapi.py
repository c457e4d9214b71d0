"""/openapi.json and /docs, made from the table of endpoints. The page loads nothing from other servers."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

from quire import __version__
from quire.sampling_params import NUMBER_RANGES
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.settings import ServerSettings

_ABOUT = "An engine that serves large language models."
_PARAMETER = re.compile(r"{(\w+)(?::path)?}")
_REF = "#/components/schemas/{name}"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code,.method{font-family:ui-monospace,monospace}.method{font-weight:600}table{border-collapse:collapse;width:100%}"
    "td{border-top:1px solid #ddd;padding:.3rem .6rem .3rem 0;vertical-align:top}details{margin:.6rem 0}"
    "summary{cursor:pointer}@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td{border-color:#444}}"
)
_POLICY = (
    b"content-security-policy",
    b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
)


def endpoints(described: Sequence[Endpoint], settings: ServerSettings) -> tuple[Endpoint, ...]:
    """The endpoints /openapi.json and /docs, for the endpoints `described` of a server with `settings`."""
    spec = describe(described, needs_key=bool(settings.keys))
    if settings.root_path:
        spec["servers"] = [{"url": settings.root_path}]
    spec_json = msgspec.json.encode(spec)
    page = render_page(spec).encode()

    async def get_openapi(context: RequestContext) -> None:
        await context.reply_bytes(spec_json, b"application/json")

    async def get_docs(context: RequestContext) -> None:
        await context.reply_bytes(page, b"text/html; charset=utf-8", headers=(_POLICY,))

    return (
        Endpoint("GET", "/openapi.json", get_openapi, "The OpenAPI description"),
        Endpoint("GET", "/docs", get_docs, "The same as a page"),
    )


def describe(described: Sequence[Endpoint], *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document."""
    bodies = list(
        dict.fromkeys(body for e in described for body in (e.body, e.reply, e.errors.schema) if body is not None)
    )
    references, schemas = msgspec.json.schema_components(bodies, ref_template=_REF)
    reference_of = dict(zip(bodies, references, strict=True))
    for body in {e.body for e in described if e.body is not None}:
        _add_ranges(schemas[str(reference_of[body]["$ref"]).rpartition("/")[2]])
    paths: dict[str, Any] = {}
    for endpoint in described:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, reference_of)
    spec: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Quire",
            "version": __version__,
            "description": _ABOUT,
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if needs_key:
        spec["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        spec["security"] = [{"key": []}]
    return spec


def render_page(spec: dict[str, Any]) -> str:
    """One HTML page: all routes, and the fields of all objects."""
    routes = "".join(
        f"<tr><td class=method>{method.upper()}</td><td><code>{escape(path)}</code></td>"
        f"<td>{escape(operation['summary'])}</td></tr>"
        for path, operations in spec["paths"].items()
        for method, operation in operations.items()
    )
    objects = "".join(_object(name, schema) for name, schema in spec["components"]["schemas"].items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Quire {__version__}</title><style>{_STYLE}</style>"
        f"<h1>Quire {__version__}</h1><p>{_ABOUT} The routes and objects are OpenAI's "
        f"with vLLM's additions, Anthropic's and Ollama's; <a href=openapi.json>openapi.json</a> says the same to "
        f"programs.</p>"
        f"<h2>Routes</h2><table>{routes}</table><h2>Objects</h2>{objects}</html>"
    )


def _add_ranges(schema: dict[str, Any]) -> None:
    """Give the numbers among a body's properties the ranges of `SamplingParams`."""
    for name, about in schema.get("properties", {}).items():
        limits = NUMBER_RANGES.get(name)
        if limits is None:
            continue
        for option in about.get("anyOf", [about]):
            if option.get("type") in ("integer", "number"):
                low = "exclusiveMinimum" if limits.above_low else "minimum"
                # A completion may ask for no tokens.
                option |= {low: 0 if name == "max_tokens" else limits.low, "maximum": limits.high}


def _operation(endpoint: Endpoint, reference_of: dict[type, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.reply is not None:
        content["application/json"] = {"schema": reference_of[endpoint.reply]}
    if endpoint.streams:
        content[endpoint.stream_type] = {}  # a schema would be that of one event, and there are several kinds
    failure = {"application/json": {"schema": reference_of[endpoint.errors.schema]}}
    operation: dict[str, Any] = {
        "operationId": "_".join(re.findall(r"\w+", f"{endpoint.method.lower()} {endpoint.path}")),
        "summary": endpoint.summary,
        "responses": {
            "200": {"description": "Done", **({"content": content} if content else {})},
            "default": {"description": "Refused or failed", "content": failure},
        },
    }
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": reference_of[endpoint.body]}},
        }
    if names := _PARAMETER.findall(endpoint.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if endpoint.public:
        operation["security"] = []
    return operation


def _object(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code>{'' if field not in required else ' *'}</td>"
        f"<td>{escape(_kind(about))}</td><td>{escape(about.get('description', ''))}</td></tr>"
        for field, about in schema.get("properties", {}).items()
    )
    about = escape(schema.get("description", ""))
    title = f"<summary><code>{escape(name)}</code> {about}</summary>"
    return f"<details id={escape(name)}>{title}<table>{rows}</table></details>"


def _kind(schema: dict[str, Any]) -> str:
    """The type of a field in words."""
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema or "enum" in schema:
        return " or ".join(map(repr, schema.get("enum", [schema.get("const")])))
    kind = str(schema.get("type", "any"))
    items = schema.get("items")
    return f"list of {_kind(items)}" if isinstance(items, dict) else kind
