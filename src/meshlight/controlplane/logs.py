"""Structured logs of istiod: one JSON object a line on stderr, under Istio's field names.

A message is constant and its variables are fields, so that log queries written for Istio work here.
Never given keys, tokens or certificates' private parts.
"""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import dataclass
from typing import Literal

Level = Literal["debug", "info", "warn", "error"]
_ORDER: dict[str, int] = {"debug": 0, "info": 1, "warn": 2, "error": 3}
_threshold = _ORDER["info"]


def set_level(level: Level) -> None:
    """Drop what is less severe than `level`."""
    global _threshold
    _threshold = _ORDER[level]


@dataclass(frozen=True, slots=True)
class Scope:
    """A named source of log lines (`ads`, `ca`, `model` …), as `istioctl admin log` calls them."""

    name: str

    def debug(self, msg: str, **fields: object) -> None:
        """What only a developer of the mesh wants."""
        self._write("debug", msg, fields)

    def info(self, msg: str, **fields: object) -> None:
        """A change of state."""
        self._write("info", msg, fields)

    def warn(self, msg: str, **fields: object) -> None:
        """Something a user should look at; the work goes on."""
        self._write("warn", msg, fields)

    def error(self, msg: str, **fields: object) -> None:
        """Something did not work; the fields say what and why."""
        self._write("error", msg, fields)

    def _write(self, level: Level, msg: str, fields: dict[str, object]) -> None:
        if _ORDER[level] < _threshold:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        line = {"level": level, "time": now.replace("+00:00", "Z"), "scope": self.name, "msg": msg, **fields}
        print(json.dumps(line, default=str), file=sys.stderr, flush=True)
