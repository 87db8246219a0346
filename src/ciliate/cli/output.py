"""What commands print: aligned columns for people, JSON and YAML for programs."""

import enum
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Output(enum.StrEnum):
    """``-o`` of most commands."""

    table = "table"
    json = "json"


class GetOutput(enum.StrEnum):
    """``-o`` of ``lab get``."""

    table = "table"
    wide = "wide"
    json = "json"
    yaml = "yaml"


def emit_json(document: Any) -> None:
    """Print a document."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def emit_yaml(document: Any) -> None:
    """Print a document."""
    import yaml

    sys.stdout.write(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    match value:
        case None:
            return "-"
        case str() | list() | tuple() | dict() if not value:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case Mapping():
            return " ".join(f"{key}={cell(one)}" for key, one in value.items())
        case list() | tuple():
            return ",".join(cell(one) for one in value)
        case _:
            return str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return aligned columns under a heading; the last one is not padded."""
    lines = [[one.upper() for one in columns], *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    text = ""
    for line in lines:
        text += "   ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip() + "\n"
    return text


def emit_rows(rows: Sequence[Mapping[str, Any]], output: Output, columns: Sequence[str] | None = None) -> None:
    """Print rows; ``columns``: keys to show, all by default. JSON always has everything."""
    if output is Output.json:
        emit_json(list(rows))
        return
    if not rows:
        print("none", file=sys.stderr)
        return
    shown = list(columns) if columns else list(dict.fromkeys(key for row in rows for key in row))
    titles = [key.replace("_", " ") for key in shown]
    sys.stdout.write(table(titles, ([row.get(key) for key in shown] for row in rows)))


def emit_document(document: Mapping[str, Any], output: Output) -> None:
    """Print one object: a line for each field."""
    if output is Output.json:
        emit_json(document)
        return
    width = max((len(key) for key in document), default=0)
    for key, value in document.items():
        if isinstance(value, list) and len(value) > 1:
            print(f"{key}:")
            for one in value:
                print(f"  {cell(one)}")
        else:
            print(f"{key + ':':<{width + 2}}{cell(value)}")
