"""Clients and operators of Kubernetes, unchanged, against the API server."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kr8s
import kubernetes
import lightkube
import pytest
import yaml
from apiserver import ApiServer
from clusters import wait_until
from kr8s.objects import ConfigMap, Deployment, Pod, new_class
from kubernetes.client.rest import ApiException
from kubernetes.dynamic import DynamicClient
from lightkube.core.exceptions import ApiError as LightkubeError
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import ConfigMap as LightConfigMap

SIZE = {"type": "integer", "default": 1}
SHOPS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "shops.example.com"},
    "spec": {
        "group": "example.com",
        "scope": "Namespaced",
        "names": {"kind": "Shop", "plural": "shops", "singular": "shop", "shortNames": ["sh"]},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "properties": {"goods": {"type": "string"}, "size": SIZE},
                            },
                            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                        },
                    }
                },
            }
        ],
    },
}  # fmt: skip
POD: dict[str, Any] = {"containers": [{"name": "main", "image": "x"}]}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    server = ApiServer(tmp_path_factory.mktemp("api"))
    server.start()
    try:
        server.kubectl("apply", "-f", "-", stdin=json.dumps(SHOPS))
        yield server
    finally:
        server.stop()


@pytest.fixture
def namespace(api: ApiServer) -> str:
    name = f"n-{uuid.uuid4().hex[:6]}"
    api.kubectl("create", "namespace", name)
    return name


@pytest.fixture
def official(api: ApiServer) -> kubernetes.client.ApiClient:
    """The official client, from the kubeconfig: client certificates."""
    return kubernetes.config.new_client_from_config(str(api.kubeconfig))


def token_kubeconfig(api: ApiServer, token: str, where: Path) -> Path:
    """A kubeconfig like the server's, with a token instead of a certificate."""
    config = yaml.safe_load(api.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    where.write_text(yaml.safe_dump(config))
    return where


# The official client


def test_the_official_client_writes_reads_and_is_refused(official: Any, namespace: str) -> None:
    core = kubernetes.client.CoreV1Api(official)
    labels = {"tier": "front"}
    meta = kubernetes.client.V1ObjectMeta(name="settings", labels=labels)
    core.create_namespaced_config_map(namespace, kubernetes.client.V1ConfigMap(metadata=meta, data={"a": "1"}))
    core.patch_namespaced_config_map("settings", namespace, {"data": {"b": "2"}})
    found = core.read_namespaced_config_map("settings", namespace)
    assert found.data == {"a": "1", "b": "2"}
    found.data["c"] = "3"
    core.replace_namespaced_config_map("settings", namespace, found)
    with pytest.raises(ApiException) as stale:
        core.replace_namespaced_config_map("settings", namespace, found)
    assert stale.value.status == 409
    assert len(core.list_namespaced_config_map(namespace, label_selector="tier in (front)").items) == 1
    with pytest.raises(ApiException) as absent:
        core.read_namespaced_config_map("none", namespace)
    assert absent.value.status == 404 and json.loads(absent.value.body)["reason"] == "NotFound"
    core.delete_namespaced_config_map("settings", namespace)
    assert core.list_namespaced_config_map(namespace).items == []


def test_the_official_client_pages(official: Any, namespace: str) -> None:
    core = kubernetes.client.CoreV1Api(official)
    for number in range(7):
        core.create_namespaced_config_map(namespace, {"metadata": {"name": f"c{number}"}})
    names, token = [], None
    while True:
        page = core.list_namespaced_config_map(namespace, limit=3, _continue=token)
        names += [item.metadata.name for item in page.items]
        token = page.metadata._continue
        if not token:
            break
    assert names == [f"c{number}" for number in range(7)]


def test_the_official_watch_follows_and_resumes(official: Any, namespace: str) -> None:
    core = kubernetes.client.CoreV1Api(official)
    version = core.list_namespaced_config_map(namespace).metadata.resource_version
    for name in ("a", "b"):
        core.create_namespaced_config_map(namespace, {"metadata": {"name": name}})
    core.delete_namespaced_config_map("a", namespace)
    watch, seen = kubernetes.watch.Watch(), []
    stream = watch.stream(
        core.list_namespaced_config_map, namespace, resource_version=version, timeout_seconds=20
    )
    for event in stream:
        seen.append((event["type"], event["object"].metadata.name))
        if len(seen) == 3:
            watch.stop()
    assert seen == [("ADDED", "a"), ("ADDED", "b"), ("DELETED", "a")]


def test_the_official_client_knows_workloads_and_scale(official: Any, namespace: str) -> None:
    apps = kubernetes.client.AppsV1Api(official)
    spec = {"selector": {"matchLabels": {"app": "w"}}, "replicas": 2,
            "template": {"metadata": {"labels": {"app": "w"}}, "spec": POD}}  # fmt: skip
    made = apps.create_namespaced_deployment(namespace, {"metadata": {"name": "w"}, "spec": spec})
    assert made.spec.strategy.rolling_update.max_surge == "25%"
    apps.patch_namespaced_deployment_scale("w", namespace, {"spec": {"replicas": 5}})
    assert apps.read_namespaced_deployment_scale("w", namespace).spec.replicas == 5
    with pytest.raises(ApiException) as invalid:
        apps.create_namespaced_deployment(
            namespace, {"metadata": {"name": "v"}, "spec": {**spec, "replicas": -1}}
        )
    assert invalid.value.status == 422
    batch = kubernetes.client.BatchV1Api(official)
    template = {"spec": {**POD, "restartPolicy": "Never"}}
    batch.create_namespaced_job(namespace, {"metadata": {"name": "j"}, "spec": {"template": template}})
    assert batch.read_namespaced_job("j", namespace).spec.completions == 1


def test_custom_objects_and_the_dynamic_client(official: Any, namespace: str) -> None:
    custom = kubernetes.client.CustomObjectsApi(official)
    shop = {"apiVersion": "example.com/v1", "kind": "Shop", "metadata": {"name": "s"}, "spec": {"goods": "tea"}}
    where = ("example.com", "v1", namespace, "shops")
    made = custom.create_namespaced_custom_object(*where, shop)
    assert made["spec"] == {"goods": "tea", "size": 1}
    custom.patch_namespaced_custom_object_status(*where, "s", {"status": {"open": True}})
    assert custom.get_namespaced_custom_object(*where, "s")["status"] == {"open": True}
    dynamic = DynamicClient(official)
    shops = dynamic.resources.get(api_version="example.com/v1", kind="Shop")
    assert [item.metadata.name for item in shops.get(namespace=namespace).items] == ["s"]
    body = {
        "apiVersion": "example.com/v1",
        "kind": "Shop",
        "metadata": {"name": "s"},
        "spec": {"goods": "coffee"},
    }
    shops.server_side_apply(body, namespace=namespace, field_manager="me", force_conflicts=True)
    assert shops.get(name="s", namespace=namespace).spec.goods == "coffee"
    shops.delete(name="s", namespace=namespace)
    assert shops.get(namespace=namespace).items == []


def test_a_token_is_a_user_with_its_roles(api: ApiServer, namespace: str, tmp_path: Path) -> None:
    api.kubectl("create", "serviceaccount", "robot", "-n", namespace)
    api.kubectl("create", "role", "reader", "--verb=get,list,watch", "--resource=configmaps", "-n", namespace)
    subject = f"--serviceaccount={namespace}:robot"
    api.kubectl("create", "rolebinding", "reader", "--role=reader", subject, "-n", namespace)
    token = api.kubectl("create", "token", "robot", "-n", namespace).strip()
    config = token_kubeconfig(api, token, tmp_path / "config")
    core = kubernetes.client.CoreV1Api(kubernetes.config.new_client_from_config(str(config)))
    assert core.list_namespaced_config_map(namespace).items == []
    with pytest.raises(ApiException) as refused:
        core.list_namespaced_secret(namespace)
    assert refused.value.status == 403
    reviews = kubernetes.client.AuthenticationV1Api(core.api_client)
    user = reviews.create_self_subject_review({}).status.user_info
    assert user.username == f"system:serviceaccount:{namespace}:robot"
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert claims["kubernetes.io"]["serviceaccount"]["name"] == "robot"


def test_leaders_are_elected_by_leases(official: Any, namespace: str) -> None:
    coordination = kubernetes.client.CoordinationV1Api(official)
    micro = "2026-01-01T00:00:00.000000Z"
    spec = {"holderIdentity": "a", "leaseDurationSeconds": 15, "renewTime": micro, "acquireTime": micro}
    made = coordination.create_namespaced_lease(namespace, {"metadata": {"name": "l"}, "spec": spec})
    made.spec.holder_identity = "b"
    coordination.replace_namespaced_lease("l", namespace, made)
    made.spec.holder_identity = "c"
    with pytest.raises(ApiException) as late:
        coordination.replace_namespaced_lease("l", namespace, made)
    assert late.value.status == 409


# kr8s


def test_kr8s(api: ApiServer, namespace: str) -> None:
    client = kr8s.api(kubeconfig=str(api.kubeconfig), namespace=namespace)
    settings = ConfigMap(
        {"metadata": {"name": "settings", "namespace": namespace}, "data": {"a": "1"}}, api=client
    )
    settings.create()
    assert settings.exists()
    settings.patch({"data": {"b": "2"}})
    settings.label({"tier": "front"})
    settings.refresh()
    assert dict(settings.data) == {"a": "1", "b": "2"}
    found = list(client.get("configmaps", namespace=namespace, label_selector="tier=front"))
    assert [c.name for c in found] == ["settings"]
    pod = Pod({"metadata": {"name": "p", "namespace": namespace}, "spec": POD}, api=client)
    pod.create()
    assert pod.status.phase == "Pending"
    deployment = Deployment(
        {
            "metadata": {"name": "w", "namespace": namespace},
            "spec": {"selector": {"matchLabels": {"app": "w"}},
                     "template": {"metadata": {"labels": {"app": "w"}}, "spec": POD}},
        },
        api=client,
    )  # fmt: skip
    deployment.create()
    deployment.scale(3)
    deployment.refresh()
    assert deployment.replicas == 3
    shop = new_class("Shop", version="example.com/v1", namespaced=True)
    shop({"metadata": {"name": "s", "namespace": namespace}, "spec": {"goods": "tea"}}, api=client).create()
    assert [s.name for s in client.get("shops.example.com", namespace=namespace)] == ["s"]
    settings.delete()
    assert not settings.exists()
    assert client.whoami() == "kubernetes-admin"


def test_kr8s_watches(api: ApiServer, namespace: str) -> None:
    client = kr8s.api(kubeconfig=str(api.kubeconfig), namespace=namespace)
    seen: list[tuple[str, str]] = []

    def follow() -> None:
        for kind, obj in client.watch("configmaps", namespace=namespace):
            seen.append((kind, obj.name))
            if kind == "DELETED":
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    api.kubectl("create", "configmap", "a", "-n", namespace)
    wait_until(lambda: ("ADDED", "a") in seen, 20, "the watch to see it")
    api.kubectl("delete", "configmap", "a", "-n", namespace)
    thread.join(20)
    assert ("DELETED", "a") in seen


# lightkube


def test_lightkube(api: ApiServer, namespace: str) -> None:
    config = lightkube.KubeConfig.from_file(str(api.kubeconfig))
    client = lightkube.Client(config=config, namespace=namespace, field_manager="light")
    client.create(LightConfigMap(metadata=ObjectMeta(name="a"), data={"x": "1"}))
    client.apply(LightConfigMap(metadata=ObjectMeta(name="b", namespace=namespace), data={"x": "1"}))
    client.patch(LightConfigMap, "a", {"data": {"y": "2"}})
    assert {c.metadata.name: c.data for c in client.list(LightConfigMap)} == {
        "a": {"x": "1", "y": "2"},
        "b": {"x": "1"},
    }
    event, first = next(client.watch(LightConfigMap))
    assert (event, first.metadata.name) == ("ADDED", "a")
    client.delete(LightConfigMap, "a")
    with pytest.raises(LightkubeError) as absent:
        client.get(LightConfigMap, "a")
    assert absent.value.status.code == 404


# Kopf


@pytest.fixture
def operator(api: ApiServer, namespace: str, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Kopf's own command, running the operator; gives its log."""
    log = tmp_path / "operator.log"
    program = Path(__file__).with_name("shop_operator.py")
    command = [sys.executable, "-m", "kopf", "run", "--standalone", "--namespace", namespace, str(program)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "KUBECONFIG": str(api.kubeconfig)}, stderr=output, stdout=output
        )
    try:
        yield log.read_text
    finally:
        process.terminate()
        process.wait(30)


def test_an_operator_of_kopf(api: ApiServer, namespace: str, operator: Callable[[], str]) -> None:
    def shop() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(api.kubectl("get", "shop", "corner", "-n", namespace, "-o", "json"))
        return found

    def status() -> dict[str, Any]:
        found: dict[str, Any] = shop().get("status") or {}
        return found

    body = {
        "apiVersion": "example.com/v1",
        "kind": "Shop",
        "metadata": {"name": "corner"},
        "spec": {"goods": "tea"},
    }
    api.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(body))
    wait_until(lambda: status().get("phase") == "Open", 60, "the operator to open the shop")
    assert status()["created"] == {"child": "corner-goods"}
    child = json.loads(api.kubectl("get", "cm", "corner-goods", "-n", namespace, "-o", "json"))
    assert child["data"] == {"goods": "tea"}
    assert child["metadata"]["ownerReferences"][0]["name"] == "corner"
    assert "example.com/shop-finalizer" in shop()["metadata"]["finalizers"]
    wait_until(lambda: status().get("ticks") == 3, 30, "the timer")
    assert "corner-clerk" in api.kubectl("get", "cm", "-n", namespace)

    api.kubectl("patch", "shop", "corner", "-n", namespace, "--type=merge", "-p", '{"spec":{"goods":"coffee"}}')
    goods = ("get", "cm", "corner-goods", "-n", namespace, "-o", "jsonpath={.data.goods}")
    wait_until(lambda: api.kubectl(*goods) == "coffee", 30, "the field's handler")
    api.kubectl("label", "shop", "corner", "-n", namespace, "audited=yes")
    wait_until(lambda: status().get("audited"), 30, "the handler of labelled shops")
    shown = ("get", "events", "-n", namespace)
    opened = r"Normal\s+Opened\s+shop/corner\s+corner is open"
    wait_until(lambda: re.search(opened, api.kubectl(*shown)), 30, "the operator's event")

    api.kubectl("delete", "shop", "corner", "-n", namespace, "--wait=false")
    wait_until(
        lambda: "NotFound" in api.kubectl("get", "shop", "corner", "-n", namespace, check=False), 60, "its end"
    )
    left = api.kubectl("get", "cm", "-n", namespace)
    assert "corner-closed" in left and "corner-clerk" not in left
    assert "Traceback" not in operator()


def test_an_operator_goes_on_after_the_api_server_was_killed(
    api: ApiServer, namespace: str, operator: Callable[[], str]
) -> None:
    def opened(name: str) -> bool:
        return "Open" in api.kubectl("get", "shop", name, "-n", namespace, "-o", "yaml", check=False)

    for number, name in enumerate(("before", "after")):
        if number:
            api.kill()
            api.start()
        body = {"apiVersion": "example.com/v1", "kind": "Shop", "metadata": {"name": name}, "spec": {}}
        api.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(body))
        wait_until(lambda name=name: opened(name), 60, f"the operator to open {name}")
