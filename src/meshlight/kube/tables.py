"""Server-side tables: what `kubectl get` prints, as `meta/v1 Table`.

Built-in kinds have the columns of `printers`; custom resources those of their `additionalPrinterColumns`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from meshlight.kube import printers
from meshlight.kube.columns import AGE, NAME, Column, age, human_duration
from meshlight.kube.resource_types import ResourceType
from meshlight.kube.resources import Object

__all__ = ["columns_of", "human_duration", "json_path", "render"]


def render(
    served: ResourceType,
    items: list[Object],
    resource_version: str,
    include_object: str,
    now: datetime | None = None,
) -> Object:
    """A Table of the objects. `include_object` is `None`, `Metadata` or `Object`."""
    now = now or datetime.now(UTC)
    columns = columns_of(served)
    rows = []
    for item in items:
        row: Object = {"cells": [column.cell(item, now) for column in columns]}
        if include_object == "Object":
            row["object"] = item
        elif include_object != "None":
            row["object"] = {
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": item["metadata"],
            }
        rows.append(row)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": resource_version},
        "columnDefinitions": [c.definition() for c in columns],
        "rows": rows,
    }


def columns_of(served: ResourceType) -> list[Column]:
    """The columns of a type, NAME first."""
    builtin = printers.COLUMNS.get((served.resource.group, served.resource.kind))
    if builtin is not None:
        return builtin if any(c.name == NAME.name for c in builtin) else [NAME, *builtin]
    if served.printer_columns:
        return [NAME, *(_custom(c) for c in served.printer_columns)]
    return [NAME, AGE]


def _custom(declared: Object) -> Column:
    kind, path = declared.get("type", "string"), declared["jsonPath"]

    def cell(obj: Object, now: datetime) -> Any:
        values = json_path(obj, path)
        if not values:
            return ""
        if kind == "date":
            return age(str(values[0]), now)
        if kind == "string":
            first = values[0]
            if isinstance(first, list):
                return "[" + ",".join(f'"{v}"' for v in first) + "]"
            return ",".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
        return values[0]

    return Column(
        declared["name"],
        cell,
        wide=declared.get("priority", 0) > 0,
        type="string" if kind == "date" else kind,
    )


_STEP = re.compile(
    r"""\.?(?:\[\?\(@\.(?P<field>[^=!]+)==["'](?P<equal>[^"']*)["']\)\]
    |\[(?P<index>\d+|\*)\]|(?P<name>(?:\\.|[^.\[\]\\])+))""",
    re.VERBOSE,
)


def json_path(obj: Any, path: str) -> list[Any]:
    """Values at a JSONPath of the kind printer columns use (names, indexes, `[*]`, equality filters)."""
    values = [obj]
    for step in _STEP.finditer(path.strip("{}")):
        following: list[Any] = []
        for value in values:
            if name := step["name"]:
                name = name.replace("\\", "")
                if isinstance(value, dict) and value.get(name) is not None:
                    following.append(value[name])
            elif isinstance(value, list):
                if field := step["field"]:
                    following += [v for v in value if str(v.get(field)) == step["equal"]]
                elif step["index"] == "*":
                    following += value
                else:
                    following += value[int(step["index"]) : int(step["index"]) + 1]
        values = following
    return values
