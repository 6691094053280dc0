"""`healthCheckNodePort`: tells a balancer before the nodes whether this node has endpoints of a Service.

One small HTTP server a Service with traffic policy Local, answering as kube-proxy does: 200 with the
number of local endpoints, 503 when there are none.
"""

from __future__ import annotations

from aiohttp import web

from meshlight.controllers.workqueue import log
from meshlight.kube.resources import SERVICES, Object, Resource

_Key = tuple[str, str]
_SERVICE_NAME = "kubernetes.io/service-name"


def local_endpoints(slices: list[Object], node: str) -> int:
    """How many ready endpoints a Service has on the node."""
    return len(
        {
            endpoint["addresses"][0]
            for item in slices
            for endpoint in item.get("endpoints") or []
            if endpoint.get("nodeName") == node and (endpoint.get("conditions") or {}).get("ready") is not False
        }
    )


class HealthChecks:
    """The servers of one node, opened and closed as Services come and go."""

    def __init__(self, node: str, address: str) -> None:
        self._node, self._address = node, address
        self._ports: dict[_Key, int] = {}
        self._slices: dict[_Key, dict[str, Object]] = {}
        self._runners: dict[_Key, web.AppRunner] = {}

    async def take(self, resource: Resource, obj: Object, deleted: bool) -> None:
        """A Service or EndpointSlice changed."""
        metadata = obj["metadata"]
        if resource is SERVICES:
            port = 0 if deleted else obj["spec"].get("healthCheckNodePort") or 0
            await self._serve((metadata["namespace"], metadata["name"]), port)
            return
        key = (metadata["namespace"], (metadata.get("labels") or {}).get(_SERVICE_NAME, ""))
        known = self._slices.setdefault(key, {})
        if deleted:
            known.pop(metadata["name"], None)
        else:
            known[metadata["name"]] = obj
        if not known:
            del self._slices[key]

    async def _serve(self, key: _Key, port: int) -> None:
        if self._ports.get(key, 0) == port:
            return
        if runner := self._runners.pop(key, None):
            await runner.cleanup()
        self._ports.pop(key, None)
        if not port:
            return
        app = web.Application()
        app.router.add_get("/{path:.*}", lambda _: self._answer(key))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._address, port).start()
        except OSError as error:
            await runner.cleanup()
            log("warning", "health check port not opened", service="/".join(key), port=port, error=str(error))
            return
        self._ports[key], self._runners[key] = port, runner

    async def _answer(self, key: _Key) -> web.Response:
        count = local_endpoints(list(self._slices.get(key, {}).values()), self._node)
        body = {
            "service": {"namespace": key[0], "name": key[1]},
            "localEndpoints": count,
            "serviceProxyHealthy": True,
        }
        return web.json_response(body, status=200 if count else 503)

    async def close(self) -> None:
        """Close every server."""
        for runner in self._runners.values():
            await runner.cleanup()
        self._runners.clear()
        self._ports.clear()
