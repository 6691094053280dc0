"""What is used: rates between two looks, processes, and the answers of the metrics API."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import aiohttp
import pytest

from meshlight.kube import metrics_api
from meshlight.kube.status import StatusError
from meshlight.node.cgroups import Usage
from meshlight.node.usage import Look, add, exposition, process_usage, rates

KEY = ("uid", "main")


def test_a_rate_is_what_was_used_between_two_looks() -> None:
    before, now = Look(10.0, {KEY: Usage(1_000_000_000, 0, 0)}), Look(14.0, {KEY: Usage(3_000_000_000, 5, 4)})
    (rate,) = rates(before, now, {}).values()
    assert (rate.nanocores, rate.window, rate.used.working_set) == (500_000_000, 4.0, 5)


@pytest.mark.parametrize("earlier", [{}, {KEY: Usage(9_000_000_000, 0, 0)}])
def test_what_is_new_or_counted_anew_counts_from_its_start(earlier: dict[Any, Usage]) -> None:
    now = Look(14.0, {KEY: Usage(3_000_000_000, 5, 4)})
    (rate,) = rates(Look(10.0, earlier), now, {KEY: 2.0}).values()
    assert (rate.nanocores, rate.window) == (1_500_000_000, 2.0)


def test_a_process_with_spaces_in_its_name() -> None:
    stat = "7 (a b) c) S 1 1 1 0 -1 0 0 0 0 0 100 20 3 2 20 0 1 0 5 0 0"
    used = process_usage(stat, 2)
    assert used.cpu == 125 * 10_000_000 and used.processes == 1
    assert add(used, used).cpu == 2 * used.cpu and add(None, used) == used


SUMMARY = {
    "node": {
        "nodeName": "n",
        "cpu": {"time": "T", "usageNanoCores": 5, "usageCoreNanoSeconds": 2_000_000_000},
        "memory": {"workingSetBytes": 4096},
        "windowSeconds": 1.5,
    },
    "pods": [
        {
            "podRef": {"name": "p", "namespace": "x", "uid": "u"},
            "cpu": {"time": "T", "usageNanoCores": 3},
            "memory": {"workingSetBytes": 2048},
            "windowSeconds": 1.5,
            "containers": [
                {
                    "name": "main",
                    "cpu": {"usageNanoCores": 3, "usageCoreNanoSeconds": 1_000_000_000},
                    "memory": {"workingSetBytes": 2048},
                }
            ],
        }
    ],
}


def test_the_text_format() -> None:
    text = exposition(SUMMARY)
    assert "node_memory_working_set_bytes 4096\n" in text
    assert 'container_cpu_usage_seconds_total{container="main",namespace="x",pod="p"} 1\n' in text


def _asked(plural: str, namespace: str | None, name: str, monkeypatch: pytest.MonkeyPatch, **query: str) -> Any:
    node = {"metadata": {"name": "n", "labels": {"zone": "1"}}}

    async def ask(_: object, found: dict[str, Any]) -> Any:
        return found, SUMMARY

    def find(_: str, namespace: str, name: str) -> dict[str, Any] | None:
        pod = {"metadata": {"name": "p", "namespace": "x", "uid": "u", "labels": {"a": "b"}}}
        pod["spec"] = {"nodeName": "n"}
        return pod if (namespace, name) == ("x", "p") else None

    monkeypatch.setattr(metrics_api, "_ask", ask)
    connections = cast(aiohttp.ClientSession, None)
    return asyncio.run(metrics_api.serve(connections, [node], find, plural, namespace, name, query))


def test_metrics_of_pods_and_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    pods = _asked("pods", None, "", monkeypatch)
    assert pods["kind"] == "PodMetricsList"
    assert pods["items"][0]["containers"] == [{"name": "main", "usage": {"cpu": "3n", "memory": "2Ki"}}]
    assert pods["items"][0]["window"] == "1.500s"
    assert _asked("pods", "other", "", monkeypatch)["items"] == []
    assert _asked("pods", "x", "", monkeypatch, labelSelector="a=c")["items"] == []
    node = _asked("nodes", None, "n", monkeypatch)
    assert (node["kind"], node["usage"]) == ("NodeMetrics", {"cpu": "5n", "memory": "4Ki"})
    with pytest.raises(StatusError):
        _asked("pods", "x", "missing", monkeypatch)
