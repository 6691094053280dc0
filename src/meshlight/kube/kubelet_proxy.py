"""Requests that the API server passes on to the node of a pod: its logs.

The API server presents its kubelet client certificate and verifies the node's against the cluster CA.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import aiohttp
from aiohttp import web

from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError, bad_request

DEFAULT_PORT = 10250
LOG_OPTIONS = (
    "follow", "previous", "sinceSeconds", "sinceTime", "timestamps", "tailLines", "limitBytes",
)  # fmt: skip


def container_of(pod: Object, asked: str | None) -> str:
    """The container a request means. Raises StatusError 400 in Kubernetes' words."""
    name = pod["metadata"]["name"]
    containers = [c["name"] for c in pod["spec"]["containers"]]
    initial = [c["name"] for c in pod["spec"].get("initContainers") or []]
    if asked:
        if asked not in containers + initial:
            raise bad_request(f"container {asked} is not valid for pod {name}")
        return asked
    if len(containers) == 1 and not initial:
        return str(containers[0])
    if len(containers) == 1:
        raise bad_request(
            f"a container name must be specified for pod {name}, choose one of: [{containers[0]}] or one of "
            f"the init containers: [{' '.join(initial)}]"
        )
    raise bad_request(
        f"a container name must be specified for pod {name}, choose one of: [{' '.join(containers)}]"
    )


def check_started(pod: Object, container: str, previous: bool) -> None:
    """Refuse to read logs of what has none yet. Raises StatusError 400 in Kubernetes' words."""
    name = pod["metadata"]["name"]
    status = pod.get("status") or {}
    statuses = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    found: Object = next((s for s in statuses if s["name"] == container), {})
    if previous and not (found.get("lastState") or {}).get("terminated"):
        raise bad_request(f'previous terminated container "{container}" in pod "{name}" not found')
    waiting = (found.get("state") or {}).get("waiting")
    if (waiting and not found.get("restartCount")) or not found:
        reason = (waiting or {}).get("reason", "ContainerCreating")
        prefix = f'container "{container}" in pod "{name}" is waiting to start: '
        if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
            raise bad_request(prefix + "trying and failing to pull image")
        raise bad_request(prefix + reason)


def endpoint(node: Object) -> str:
    """The base address of a node's kubelet. Raises StatusError 503."""
    status = node.get("status") or {}
    for address in status.get("addresses") or []:
        if address["type"] == "InternalIP":
            port = ((status.get("daemonEndpoints") or {}).get("kubeletEndpoint") or {}).get(
                "Port", DEFAULT_PORT
            )
            return f"https://{address['address']}:{port}"
    message = f"node {node['metadata']['name']} has no InternalIP address"
    raise StatusError(503, "ServiceUnavailable", message)


class KubeletProxy:
    """Connections to the nodes; closed by `close()`."""

    def __init__(self, pki: Path) -> None:
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "apiserver-kubelet-client.crt", pki / "apiserver-kubelet-client.key")
        self._context = context
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close idle connections."""
        if self._session is not None:
            await self._session.close()

    def connections(self) -> aiohttp.ClientSession:
        """Connections to kubelets, made with the API server's client certificate."""
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._context, limit=0)
            timeout = aiohttp.ClientTimeout(total=None, connect=5)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._session

    async def logs(self, request: web.Request, pod: Object, node: Object) -> web.StreamResponse:
        """Stream a container's log to the client. Raises StatusError."""
        container = container_of(pod, request.query.get("container"))
        check_started(pod, container, request.query.get("previous") == "true")
        metadata = pod["metadata"]
        url = f"{endpoint(node)}/containerLogs/{metadata['namespace']}/{metadata['name']}/{container}"
        query = {key: request.query[key] for key in LOG_OPTIONS if key in request.query}
        try:
            async with self.connections().get(url, params=query) as upstream:
                if upstream.status >= 400:
                    raise StatusError(upstream.status, "BadRequest", (await upstream.text()).strip())
                response = web.StreamResponse(headers={"Content-Type": "text/plain"})
                await response.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except aiohttp.ClientConnectorError as error:
            name = node["metadata"]["name"]
            message = f"the kubelet of node {name} does not answer: {error}"
            raise StatusError(503, "ServiceUnavailable", message) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise StatusError(500, "InternalError", f"the log stream broke: {error}") from error
