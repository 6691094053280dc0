"""Remote sampling: which share of their traces clients should record, by service and operation.

Strategies come from a file in Jaeger's format, or there is one default for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from meshlight.proto import jaeger_pb2 as jaeger

Json = dict[str, Any]


class StrategyError(ValueError):
    """A strategies file that says nothing sensible; the message names the place."""


@dataclass(frozen=True, slots=True)
class Strategies:
    """What each service is told; `services` by name, in the form of the HTTP answer."""

    default: Json
    services: Mapping[str, Json] = field(default_factory=dict)

    def of(self, service: str) -> Json:
        """The strategy of a service as JSON."""
        return self.services.get(service, self.default)


def probabilistic(rate: float) -> Json:
    """Every trace with the same probability."""
    return {"strategyType": "PROBABILISTIC", "probabilisticSampling": {"samplingRate": rate}}


def read(path: Path) -> Strategies:
    """A strategies file. Raises StrategyError, OSError."""
    try:
        found = orjson.loads(path.read_bytes())
        default = _strategy(
            found.get("default_strategy") or {"type": "probabilistic", "param": 1.0}, "default_strategy"
        )
        services = {}
        for index, item in enumerate(found.get("service_strategies") or []):
            services[str(item["service"])] = _strategy(item, f"service_strategies[{index}]", default)
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise StrategyError(f"{path}: {error!r} is not as Jaeger's sampling strategies are written") from None
    return Strategies(default, services)


def _strategy(found: Json, where: str, default: Json | None = None) -> Json:
    kind, parameter = found.get("type", "probabilistic"), found.get("param", 1.0)
    if kind == "probabilistic":
        if not isinstance(parameter, (int, float)) or not 0 <= parameter <= 1:
            raise StrategyError(f"{where}: param of probabilistic must be between 0 and 1, not {parameter!r}")
        made = probabilistic(float(parameter))
    elif kind == "ratelimiting":
        limit = int(parameter)
        made = {"strategyType": "RATE_LIMITING", "rateLimitingSampling": {"maxTracesPerSecond": limit}}
    else:
        raise StrategyError(f"{where}: type must be probabilistic or ratelimiting, not {kind!r}")
    if operations := found.get("operation_strategies"):
        rate = made.get("probabilisticSampling", {}).get("samplingRate", 1.0)
        made["operationSampling"] = {
            "defaultSamplingProbability": rate,
            "defaultLowerBoundTracesPerSecond": 0,
            "perOperationStrategies": [
                {
                    "operation": str(o["operation"]),
                    "probabilisticSampling": {"samplingRate": float(o.get("param", rate))},
                }
                for o in operations
            ],
        }
    return made


def message(strategy: Json) -> Any:
    """A strategy as SamplingStrategyResponse."""
    made: Any = jaeger.SamplingStrategyResponse()
    if rate := strategy.get("probabilisticSampling"):
        made.probabilistic.sampling_rate = rate["samplingRate"]
    if limit := strategy.get("rateLimitingSampling"):
        made.strategy_type = 1
        made.rate_limiting.max_traces_per_second = limit["maxTracesPerSecond"]
    if operations := strategy.get("operationSampling"):
        made.operation_sampling.default_probability = operations["defaultSamplingProbability"]
        for operation in operations["perOperationStrategies"]:
            of = made.operation_sampling.per_operation.add(operation=operation["operation"])
            of.probabilistic.sampling_rate = operation["probabilisticSampling"]["samplingRate"]
    return made


def add_sampling(app: web.Application, strategies: Strategies, *paths: str) -> None:
    """GET a service's strategy as JSON on some paths."""

    async def handle(request: web.Request) -> web.Response:
        services = request.query.getall("service", [])
        if len(services) != 1:
            return web.Response(status=400, text="'service' parameter must be provided once\n")
        return web.Response(body=orjson.dumps(strategies.of(services[0])), content_type="application/json")

    for path in paths:
        app.router.add_get(path, handle)
