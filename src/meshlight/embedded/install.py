"""Put cluster-101's objects into a fresh API: custom resources, namespaces, mesh configuration.

Run by the supervisor as a process of its own: `python -m meshlight.embedded.install --kubeconfig F
--cluster NAME --nodes N`. What exists is brought to the manifest's spec; what users added beside it stays.
Nodes that the cluster had when it was larger are taken away.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from importlib.resources import files

import yaml

from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import CUSTOM_RESOURCE_DEFINITIONS, NAMESPACES, NODES, Object, Resource

MANIFESTS = (
    "istio-crds.yaml", "gateway-api-crds.yaml", "flux-crds.yaml", "prometheus-crds.yaml", "cilium-crds.yaml",
    "system.yaml", "network.yaml", "coredns.yaml", "istiod.yaml", "ztunnel.yaml", "jaeger.yaml",
)  # fmt: skip
COMPLETE = "meshlight.io/installed"
"""Annotation of namespace kube-system once everything is in."""


def manifests() -> list[Object]:
    """Every object that a cluster starts with, in the order in which they can be created."""
    folder = files("meshlight.embedded") / "manifests"
    return [
        obj
        for name in MANIFESTS
        for obj in yaml.load_all((folder / name).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if obj
    ]


async def install(client: Client) -> None:
    """Create what is missing and merge the manifests into what exists. Raises ApiError."""
    known: dict[tuple[str, str], Resource] = {}
    for obj in manifests():
        kind = (obj["apiVersion"], obj["kind"])
        if kind not in known:
            known = {(r.api_version, r.kind): r for r in await client.discover()}
        resource = known[kind]
        metadata = obj["metadata"]
        try:
            await client.create(resource, obj)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            # An upgrade brings new schemas; a user's own settings are the user's.
            if resource == CUSTOM_RESOURCE_DEFINITIONS:
                await client.patch(resource, metadata["name"], {"spec": obj["spec"]}, metadata.get("namespace"))
    await client.patch(NAMESPACES, "kube-system", {"metadata": {"annotations": {COMPLETE: "true"}}})


def surplus(nodes: list[Object], cluster: str, count: int) -> list[str]:
    """Names of the cluster's own nodes beyond the first `count`: nobody will ever speak for them again."""
    found = []
    for node in nodes:
        stem, _, number = node["metadata"]["name"].rpartition("-node-")
        if stem == cluster and number.isdigit() and int(number) > count:
            found.append(node["metadata"]["name"])
    return found


async def run(kubeconfig: str, cluster: str, count: int) -> None:
    """Wait for the API, then install."""
    async with Client.from_kubeconfig(kubeconfig) as client:
        while True:
            try:
                await client.request("GET", "/readyz")
                break
            except ApiUnreachable:
                await asyncio.sleep(0.05)
            except ApiError:
                break
        for name in surplus((await client.list(NODES)).items, cluster, count):
            with contextlib.suppress(ApiError):
                await client.delete(NODES, name)
        await install(client)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="install cluster-101's objects")
    parser.add_argument("--kubeconfig", required=True)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--nodes", required=True, type=int)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.kubeconfig, arguments.cluster, arguments.nodes))


if __name__ == "__main__":
    main()
