"""The monitor tab: calls, errors and latencies of services over time, computed from spans.

Answers have the shape of Jaeger's `/api/metrics/*`: metric families of labelled points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshlight.tracing.query import BadQuery, number
from meshlight.tracing.storage import TraceStore
from meshlight.tracing.store.search import KINDS
from meshlight.tracing.store.series import Bucket

_NAMES = {
    "latencies": "service_latencies",
    "calls": "service_call_rate",
    "errors": "service_error_rate",
}
_HELP = {
    "latencies": "{q}th quantile latency, grouped by service{by}",
    "calls": "calls/sec, grouped by service{by}",
    "errors": "error rate, computed as a fraction of errors/sec over calls/sec, grouped by service{by}",
}
MAX_POINTS = 2000


def _kinds(parameters: Any) -> tuple[int, ...]:
    found = []
    for text in parameters.getall("spanKind", []) or ["server"]:
        name = text.lower().removeprefix("span_kind_")
        if name not in KINDS:
            raise BadQuery(f"unsupported span kind: {text!r}")
        found.append(KINDS[name])
    return tuple(found)


async def answer(store: TraceStore, metric: str, parameters: Any, now: int) -> dict[str, Any]:
    """The family of a metric. Times and steps of the request are in ms. Raises BadQuery."""
    if metric not in _NAMES:
        raise BadQuery(f"metric {metric!r} is none of {', '.join(_NAMES)}")
    services = tuple(parameters.getall("service", []))
    if not services:
        raise BadQuery("please provide at least one service name")
    quantile = _quantile(parameters) if metric == "latencies" else 0.0
    end = number(parameters, "endTs", now // 10**6) * 10**6
    back = number(parameters, "lookback", 3_600_000) * 10**6
    step = number(parameters, "step", 5_000) * 10**6
    window = number(parameters, "ratePer", 600_000) * 10**6
    if back <= 0 or step <= 0 or window <= 0:
        raise BadQuery("lookback, step and ratePer must be positive")
    if back // step > MAX_POINTS:
        raise BadQuery(
            f"lookback / step gives {back // step} points; {MAX_POINTS} are the limit: choose a larger step"
        )
    by_operation = parameters.get("groupByOperation", "false") == "true"
    points = range(end - back, end + 1, step)
    series = await store.series(services, _kinds(parameters), by_operation, list(points), min(window, back))
    name = _NAMES[metric].replace("service_", "service_operation_") if by_operation else _NAMES[metric]
    metrics = [
        {"labels": _labels(*key), "metricPoints": _points(metric, buckets, points, min(window, back), quantile)}
        for key, buckets in sorted(series.items())
    ]
    by = " & operation" if by_operation else ""
    return {
        "name": name,
        "type": "GAUGE",
        "help": _HELP[metric].format(q=quantile, by=by),
        "metrics": metrics,
    }


def _quantile(parameters: Mapping[str, str]) -> float:
    text = parameters.get("quantile", "")
    try:
        value = float(text)
    except ValueError:
        raise BadQuery(f"quantile {text!r} must be a number between 0 and 1") from None
    if not 0 < value <= 1:
        raise BadQuery(f"quantile {text!r} must be a number between 0 and 1")
    return value


def _labels(service: str, operation: str) -> list[dict[str, str]]:
    labels = [{"name": "service_name", "value": service}]
    return [*labels, {"name": "operation", "value": operation}] if operation else labels


def _points(
    metric: str, buckets: list[Bucket], points: range, window: int, quantile: float
) -> list[dict[str, Any]]:
    made = []
    for moment, bucket in zip(points, buckets, strict=True):
        if metric == "calls":
            value: float | None = bucket.calls / (window / 10**9)
        elif metric == "errors":
            value = bucket.errors / bucket.calls if bucket.calls else None
        else:
            value = bucket.quantile(quantile)
            value = value / 10**6 if value is not None else None  # milliseconds, as the UI expects
        if value is not None:
            stamp = f"{_rfc3339(moment)}"
            made.append({"gaugeValue": {"doubleValue": value}, "timestamp": stamp})
    return made


def _rfc3339(nanoseconds: int) -> str:
    import datetime

    seconds, rest = divmod(nanoseconds, 10**9)
    base = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{base}.{rest:09d}Z" if rest else f"{base}Z"
