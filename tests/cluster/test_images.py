"""Pods of OCI images, from disk and from a registry: their own root, entrypoint, user and environment."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster, wait_until
from images import Registry, build

SAID = """1234
2345
/app
bar default /home/app
from the base
opaque
stays.txt
above
"""
CONFIG_MAP = "meshlight-registries"


def image_pod(
    name: str, namespace: str, image: str, pull: str = "IfNotPresent", **container: Any
) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": image, "imagePullPolicy": pull, **container}],
        },
    }


def running(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    """The status of the pod's container once it runs."""

    def found() -> dict[str, Any] | None:
        statuses = cluster.get("pod", name, "-n", namespace)["status"].get("containerStatuses") or [{}]
        return statuses[0] if "running" in (statuses[0].get("state") or {}) else None

    return dict(wait_until(found, 60, f"{name} to run"))


def waiting(cluster: Cluster, namespace: str, name: str) -> dict[str, str]:
    """Why the pod's container waits."""
    statuses = cluster.get("pod", name, "-n", namespace)["status"].get("containerStatuses") or [{}]
    return dict((statuses[0].get("state") or {}).get("waiting") or {})


@pytest.fixture
def registries(cluster: Cluster) -> Iterator[dict[str, str]]:
    """Entries of the ConfigMap that names registries, as the test fills it."""
    entries: dict[str, str] = {}
    yield entries
    cluster.kubectl("delete", "configmap", CONFIG_MAP, "-n", "kube-system", check=False)


def name_registry(cluster: Cluster, registry: Registry) -> None:
    value = f"--from-literal=test=registry.test:5000 {registry.url}"
    cluster.kubectl("create", "configmap", CONFIG_MAP, "-n", "kube-system", value)


@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
def test_an_image_on_disk_runs_in_its_own_root(
    form: str, cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    built = build()
    image = {
        "oci": lambda: f"oci:{built.layout(tmp_path / 'layout')}:1.0",
        "oci-archive": lambda: f"oci-archive:{built.archive(tmp_path / 'a.tar', tmp_path / 'scratch')}",
        "docker-archive": lambda: f"docker-archive:{built.docker_archive(tmp_path / 'd.tar')}:app:1.0",
    }[form]()
    args = image_pod("args", namespace, image, args=["mine"], env=[{"name": "FOO", "value": "own"}])
    args["spec"]["containers"][0]["securityContext"] = {"runAsUser": 7, "runAsGroup": 8}
    cluster.apply(image_pod("plain", namespace, image), args)
    status = running(cluster, namespace, "plain")
    assert status["imageID"] == (built.manifest if form != "docker-archive" else built.config)

    def said() -> str:
        text = cluster.kubectl("logs", "-n", namespace, "plain")
        return text if "mine\n" in text else ""

    text = wait_until(said, 30, "what the image's program says")
    assert text.startswith(SAID)
    listed = text[len(SAID) :].split("\n")
    assert {"app", "bin", "run.sh", "etc", "proc", "dev"} <= set(listed) and "home" not in listed
    assert any(line.startswith("drwxr-xr-x") and "app" in line for line in listed)
    # A command beside it has its root, user and environment too.
    script = "id -u; pwd; echo $FOO; cat /etc/hostname"
    shown = cluster.kubectl("exec", "-n", namespace, "plain", "--", "sh", "-c", script)
    assert shown == "1234\n/app\nbar\nplain\n"
    running(cluster, namespace, "args")
    lines = wait_until(lambda: cluster.kubectl("logs", "-n", namespace, "args").splitlines()[:4], 30, "args")
    assert lines == ["7", "8", "/app", "own mine /"]
    events = cluster.kubectl("get", "events", "-n", namespace)
    assert "Pulling image" in events and "Successfully pulled image" in events


def test_an_image_of_a_registry_that_the_user_named(
    cluster: Cluster, namespace: str, registries: dict[str, str]
) -> None:
    with Registry(build("from a registry\n"), user="me") as registry:
        image = "registry.test:5000/team/app:1.0"
        auth = base64.b64encode(b"me:secret").decode()
        login = json.dumps({"auths": {"registry.test:5000": {"auth": auth}}})
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "login", "namespace": namespace},
            "type": "kubernetes.io/dockerconfigjson",
            "stringData": {".dockerconfigjson": login},
        }
        node = cluster.get("nodes")["items"][0]["metadata"]["name"]
        first, second = (image_pod(name, namespace, image) for name in ("first", "second"))
        never = image_pod("never", namespace, image, "Never")
        stranger = image_pod("stranger", namespace, image, "Always")
        for pod in (first, second, never, stranger):
            pod["spec"]["nodeName"] = node
        for pod in (first, second):
            pod["spec"]["imagePullSecrets"] = [{"name": "login"}]
        cluster.apply(secret, first)
        wait_until(lambda: "Pull" in waiting(cluster, namespace, "first").get("reason", ""), 30, "a refusal")
        assert CONFIG_MAP in waiting(cluster, namespace, "first")["message"], "how to name a registry"
        cluster.apply(never)
        wait_until(
            lambda: waiting(cluster, namespace, "never").get("reason") == "ErrImagePull", 30, "a refusal"
        )

        name_registry(cluster, registry)
        status = running(cluster, namespace, "first")
        assert status["imageID"] == f"registry.test:5000/team/app@{registry.image.manifest}"
        wait_until(
            lambda: "from a registry" in cluster.kubectl("logs", "-n", namespace, "first"), 30, "its words"
        )
        running(cluster, namespace, "never")  # it is here now
        asked = len(registry.asked)
        cluster.apply(second)
        running(cluster, namespace, "second")
        assert len(registry.asked) == asked, "what is here is not pulled again"
        cluster.apply(stranger)
        wait_until(
            lambda: "401" in waiting(cluster, namespace, "stranger").get("message", ""), 30, "no credentials"
        )


def test_pulls_that_fail_say_why_and_are_tried_again(
    cluster: Cluster, namespace: str, registries: dict[str, str]
) -> None:
    built = build("damaged\n")
    built.tag = "damaged"  # what another test pulled stays pulled
    whole = dict(built.blobs)
    damaged = next(d for d, c in whole.items() if c.startswith(b"\x1f\x8b") and len(c) < 2000)
    built.blobs[damaged] = built.blobs[damaged][:-9] + b"something"
    with Registry(built) as registry:
        name_registry(cluster, registry)
        cluster.apply(
            image_pod("damaged", namespace, "registry.test:5000/team/app:damaged"),
            image_pod("missing", namespace, "registry.test:5000/team/none:1.0"),
            image_pod("never", namespace, "registry.test:5000/team/app:other", "Never"),
            image_pod("wrong", namespace, "oci:relative/path"),
            image_pod("absent", namespace, "oci:/no/such/layout"),
        )
        expected = {
            "damaged": ("ErrImagePull ImagePullBackOff", ""),
            "missing": ("ErrImagePull ImagePullBackOff", "manifest unknown"),
            "never": ("ErrImageNeverPull", "imagePullPolicy is Never"),
            "wrong": ("InvalidImageName", "absolute"),
            "absent": ("ErrImagePull ImagePullBackOff", "/no/such/layout"),
        }
        for name, (reasons, words) in expected.items():
            wait_until(
                lambda n=name, r=reasons: waiting(cluster, namespace, n).get("reason", "-") in r.split(),  # type: ignore[misc]
                60,
                f"{name} to be refused: {waiting(cluster, namespace, name)}",
            )
            assert words in waiting(cluster, namespace, name)["message"]
        reason = "ImagePullBackOff"
        wait_until(lambda: waiting(cluster, namespace, "damaged").get("reason") == reason, 60, reason)
        built.blobs |= whole
        running(cluster, namespace, "damaged")
