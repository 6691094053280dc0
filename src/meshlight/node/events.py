"""Logs of the node agent, and the recorder of its Events about pods."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from meshlight.kube import recorder
from meshlight.kube.client import Client


def log(level: str, msg: str, **fields: Any) -> None:
    """Write one JSON log object on stderr."""
    line = {"ts": time.time(), "level": level, "msg": msg, **fields}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)


class Recorder(recorder.Recorder):
    """Writes core/v1 Events as component `kubelet` of one node."""

    def __init__(self, client: Client, node: str) -> None:
        super().__init__(client, "kubelet", node, self._not_recorded)

    @staticmethod
    def _not_recorded(reason: str, error: str) -> None:
        log("warning", "event not recorded", reason=reason, error=error)
