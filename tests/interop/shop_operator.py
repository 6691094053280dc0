"""An operator written as Kopf's documentation writes them; `kopf run` runs it against the API under test."""

import asyncio
import datetime
import os

import kopf
import kubernetes.client
import kubernetes.config

kubernetes.config.load_kube_config(os.environ["KUBECONFIG"])


@kopf.on.startup()
def configure(settings, **_):
    settings.posting.level = 20
    settings.watching.server_timeout = 60
    settings.persistence.finalizer = "example.com/shop-finalizer"


@kopf.on.create("example.com", "v1", "shops")
def created(spec, name, namespace, logger, patch, body, **_):
    """Make the child, owned by the shop."""
    child = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-goods", "labels": {"shop": name}},
        "data": {"goods": spec.get("goods", "none")},
    }
    kopf.adopt(child)
    made = kubernetes.client.CoreV1Api().create_namespaced_config_map(namespace, child)
    logger.info("opened %s", name)
    kopf.info(body, reason="Opened", message=f"{name} is open")
    patch.status["phase"] = "Open"
    return {"child": made.metadata.name}


@kopf.on.field("example.com", "v1", "shops", field="spec.goods")
def goods_changed(old, new, name, namespace, **_):
    """Follow one field."""
    if old is None:
        return
    body = {"data": {"goods": new}}
    kubernetes.client.CoreV1Api().patch_namespaced_config_map(f"{name}-goods", namespace, body)


@kopf.on.update("example.com", "v1", "shops", labels={"audited": "yes"})
def audited(diff, patch, **_):
    """Only shops with a label."""
    patch.status["audited"] = len(diff)


@kopf.timer("example.com", "v1", "shops", interval=0.5, idle=0)
def counted(status, patch, **_):
    """Time passes."""
    patch.status["ticks"] = min(status.get("ticks", 0) + 1, 3)


@kopf.daemon("example.com", "v1", "shops")
async def attended(stopped, name, namespace, **_):
    """Somebody is there until the shop closes."""
    core = kubernetes.client.CoreV1Api()
    clerk = {"metadata": {"name": f"{name}-clerk"}}
    await asyncio.to_thread(core.create_namespaced_config_map, namespace, clerk)
    while not stopped:
        await stopped.wait(10)
    await asyncio.to_thread(core.delete_namespaced_config_map, f"{name}-clerk", namespace)


@kopf.on.event("", "v1", "configmaps", labels={"shop": kopf.PRESENT})
def child_seen(event, name, logger, **_):
    """Low-level events of the child."""
    logger.debug("child %s: %s", name, event["type"])


@kopf.on.delete("example.com", "v1", "shops")
async def closed(name, namespace, logger, retry, **_):
    """Leave a note behind, at the second attempt."""
    if retry < 1:
        raise kopf.TemporaryError("the till is open", delay=0.2)
    note = {"metadata": {"name": f"{name}-closed"}, "data": {"at": datetime.datetime.now().isoformat()}}
    await asyncio.to_thread(kubernetes.client.CoreV1Api().create_namespaced_config_map, namespace, note)
