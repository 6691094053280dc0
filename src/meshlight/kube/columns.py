"""Columns of tables, and the cells that many kinds share: fields, ages, selectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from meshlight.kube.resources import Object

NONE = "<none>"
UNKNOWN = "<unknown>"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name, how to get the cell from an object, and whether only `-o wide` shows it."""

    name: str
    cell: Callable[[Object, datetime], Any]
    wide: bool = False
    type: str = "string"

    def definition(self) -> Object:
        """The `TableColumnDefinition`."""
        return {
            "name": self.name,
            "type": self.type,
            "format": "name" if self.name == "Name" else "",
            "description": self.name,
            "priority": 1 if self.wide else 0,
        }


def human_duration(seconds: float) -> str:
    """An age as `kubectl` prints it (k8s.io/apimachinery `duration.HumanDuration`)."""
    s = int(seconds)
    if s < -1:
        return "<invalid>"
    s = max(s, 0)
    if s < 120:
        return f"{s}s"
    minutes, hours, days = s // 60, s // 3600, s // 86400
    if minutes < 10:
        return f"{minutes}m{s % 60}s" if s % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    if days < 365 * 2:
        return f"{days}d"
    years = days // 365
    if years < 8:
        return f"{years}y{days % 365}d" if days % 365 else f"{years}y"
    return f"{years}y"


def age(timestamp: str | None, now: datetime) -> str:
    """The age of an RFC 3339 time."""
    if not timestamp:
        return UNKNOWN
    then = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    return human_duration((now - then).total_seconds())


def at(*path: str, default: Any = NONE) -> Callable[[Object, datetime], Any]:
    """The cell of the field at a path; `default` where it is absent or empty."""

    def cell(obj: Object, _: datetime) -> Any:
        value: Any = obj
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return default if value in (None, "") else value

    return cell


NAME = Column("Name", at("metadata", "name"))
AGE = Column("Age", lambda o, now: age(o["metadata"].get("creationTimestamp"), now))


def number(*path: str) -> Callable[[Object, datetime], Any]:
    """The cell of a number, 0 where it is absent."""
    return at(*path, default=0)


def selector(*path: str) -> Callable[[Object, datetime], str]:
    """The cell of a map of labels."""

    def cell(obj: Object, now: datetime) -> str:
        found = at(*path, default={})(obj, now)
        return ",".join(f"{k}={v}" for k, v in sorted(found.items())) or NONE

    return cell


def count(field: str) -> Callable[[Object, datetime], int]:
    """The cell of a list's or map's length."""
    return lambda obj, _: len(obj.get(field) or {})
