"""Launch a program of this machine as a workload: a Pod, its service account, and a Service for its port."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import NAMESPACES, PODS, SERVICE_ACCOUNTS, SERVICES, Object, Resource
from meshlight.refusal import Refusal

LOCAL_IMAGE = "meshlight.io/local"
"""Image of a workload that is a program of this machine; its `command` says which."""
_WAITING_FAULTS = (
    "ErrImagePull", "ImagePullBackOff", "CreateContainerError", "CreateContainerConfigError",
    "RunContainerError", "CrashLoopBackOff",
)  # fmt: skip


class RunError(Refusal):
    """The program cannot be launched; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What to run: `command` is an absolute program path and its arguments."""

    name: str
    namespace: str
    command: tuple[str, ...]
    directory: str
    ports: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    node: str | None = None


def resolve(program: str, path: str | None = None) -> str:
    """The absolute path of a program, searched as a shell would. Raises RunError naming it."""
    found = shutil.which(program, path=path)
    if found is None:
        kind = "is not an executable file" if os.sep in program else "is not on PATH"
        raise RunError(f"{program} {kind}: give the path of a program of this machine")
    return str(Path(found).absolute())


def objects(workload: Workload) -> list[tuple[Resource, Object]]:
    """The objects of a workload in the order in which to create them."""
    labels = {"app": workload.name, "app.kubernetes.io/managed-by": "meshlight-run"}
    metadata = {"name": workload.name, "namespace": workload.namespace, "labels": labels}
    container: Object = {
        "name": "program",
        "image": f"{LOCAL_IMAGE}/{workload.name}",
        "command": list(workload.command),
        "workingDir": workload.directory,
        "env": [{"name": k, "value": v} for k, v in workload.environment.items()],
        "ports": [{"containerPort": port, "name": f"tcp-{port}"} for port in workload.ports],
    }
    if workload.ports:
        container["readinessProbe"] = {"tcpSocket": {"port": workload.ports[0]}, "periodSeconds": 1}
    spec: Object = {"serviceAccountName": workload.name, "containers": [container]}
    if workload.node:
        spec["nodeName"] = workload.node
    made: list[tuple[Resource, Object]] = [
        (SERVICE_ACCOUNTS, {"metadata": metadata}),
        (PODS, {"metadata": metadata, "spec": spec}),
    ]
    if workload.ports:
        ports = [{"name": f"tcp-{p}", "port": p, "targetPort": p} for p in workload.ports]
        made.append(
            (SERVICES, {"metadata": metadata, "spec": {"selector": {"app": workload.name}, "ports": ports}})
        )
    return made


async def run(client: Client, workload: Workload, timeout: float) -> Object:  # noqa: ASYNC109 - whole launch
    """Create the workload and wait until it is ready; returns its Pod.

    The namespace is created when it does not exist. Raises RunError when the name is taken, the
    program does not start, or it is not ready after `timeout` seconds; a refused launch leaves
    nothing of this call behind.
    """
    try:
        await client.create(NAMESPACES, {"metadata": {"name": workload.namespace}})
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
    made: list[tuple[Resource, Object]] = []
    try:
        for resource, obj in objects(workload):
            made.append((resource, await _create(client, resource, obj, workload)))
        async with asyncio.timeout(timeout):
            return await _ready(client, workload)
    except TimeoutError:
        where = f"kubectl describe pod -n {workload.namespace} {workload.name}"
        raise RunError(f"{workload.name} is not ready after {timeout:g} s; look with `{where}`") from None
    except (RunError, ApiError):
        for resource, obj in reversed(made):
            await client.delete(resource, obj["metadata"]["name"], workload.namespace, grace_period_seconds=0)
        raise


async def _create(client: Client, resource: Resource, obj: Object, workload: Workload) -> Object:
    try:
        return await client.create(resource, obj)
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
        taken = f"{resource.kind} {workload.name} exists already in namespace {workload.namespace}"
        raise RunError(f"{taken}: choose another --name or delete it") from error


async def _ready(client: Client, workload: Workload) -> Object:
    selector = f"metadata.name={workload.name}"
    async for event in client.watch(PODS, workload.namespace, field_selector=selector):
        status = event.object.get("status") or {}
        if any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or []):
            return event.object
        for container in status.get("containerStatuses") or []:
            waiting = container.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in _WAITING_FAULTS:
                raise RunError(f"{workload.name}: {waiting['reason']}: {waiting.get('message', '')}")
    raise AssertionError("a watch ends only by an error")
