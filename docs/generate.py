"""Writes docs/configuration.md from the settings tree and docs/http.md from the OpenAPI document.

`make docs` runs it; a test fails when what is committed is not what it writes.
"""

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from serving.config import Profile, load_profile, profile_names

DOCS = Path(__file__).parent


def configuration() -> str:
    """Every setting, branch by branch, with type, default and meaning."""
    names = ", ".join(f"`{name}`" for name in profile_names())
    lines = [
        "# Configuration",
        "",
        "A profile is one YAML file. Those that come with the project are "
        f"{names} (`serving/profiles/`); `--profile` takes such a name or a path.",
        "An unknown key is an error that names the nearest valid one. This page is generated: `make docs`.",
        "",
    ]
    _branch(lines, Profile, "", set())
    return "\n".join(lines) + "\n"


def _branch(lines: list[str], model: type[BaseModel], path: str, seen: set[str]) -> None:
    title = f"`{path}`" if path else "The profile"
    summary = (model.__doc__ or "").strip().splitlines()[0]
    lines += [f"## {title}", "", summary, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    below: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        key = f"{path}.{name}" if path else name
        meaning = field.description or (f"see [`{key}`](#{key.replace('.', '')})" if inner else "")
        default = "required" if field.is_required() else "…" if inner else f"`{_default(field)}`"
        lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {meaning} |")
        if inner:
            below.append((key, inner))
    lines.append("")
    for key, inner in below:
        _branch(lines, inner, key, seen)


def _default(field: Any) -> Any:
    return field.default if field.default is not PydanticUndefined else field.default_factory()


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(a) for a in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin is dict:
        return f"map of {_type(arguments[0])} to {_type(arguments[1])}"
    if annotation is type(None):
        return "none"
    return "settings" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else annotation.__name__


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def http() -> str:
    """Every route, then every shape, of the OpenAPI document."""
    from serving.http.ingress import http_app

    document = http_app(load_profile("embedded"), "unused").openapi()
    lines = [
        "# HTTP API",
        "",
        document["info"]["description"],
        "",
        "A running server shows the same, and lets you try it, at `/docs`. This page is generated: `make docs`.",
        "",
        "| route | what | answers |",
        "|---|---|---|",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            good = [(c, r) for c, r in operation["responses"].items() if c.startswith("2")]
            answers = ", ".join(f"{code} {_schema_name(response)}".strip() for code, response in good)
            what = operation.get("description", "").split("\n")[0]
            lines.append(f"| `{method.upper()} {path}` | {what} | {answers} |")
    lines += ["", "Failures, on every route, as `application/problem+json`:", "", "| status | when |", "|---|---|"]
    some = document["paths"]["/v1/memories"]["post"]["responses"]
    lines += [f"| {code} | {response['description']} |" for code, response in some.items() if code >= "400"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        if "properties" not in schema or name in ("HTTPValidationError", "ValidationError"):
            continue
        lines += ["", f"## {name}", "", (schema.get("description") or "").strip(), ""]
        lines += ["| field | type | |", "|---|---|---|"]
        required = set(schema.get("required", ()))
        for field, value in schema["properties"].items():
            needed = "required" if field in required else ""
            meaning = value.get("description", "")
            lines.append(f"| `{field}` | {_json_type(value)} | {'; '.join(filter(None, (needed, meaning)))} |")
    return "\n".join(lines) + "\n"


def _schema_name(response: dict[str, Any]) -> str:
    for kind, content in response.get("content", {}).items():
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if name else f"`{kind}`"
    return ""


def _json_type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in value:
        return " or ".join(_json_type(option) for option in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{option}`" for option in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        return f"list of {_json_type(value.get('items', {}))}"
    return value.get("type", "any")


PAGES = {"configuration.md": configuration, "http.md": http}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote docs/{name}")
