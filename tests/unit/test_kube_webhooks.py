"""Admission webhooks: who is asked, what they are sent, what their answers do."""

from __future__ import annotations

import base64
import ssl
from typing import Any

import orjson
import pytest

from meshlight.kube.admission import Request
from meshlight.kube.builtin_kinds import BUILTIN
from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError
from meshlight.kube.store import Key, Store
from meshlight.kube.webhooks import HookError, Webhooks, amended

PODS = next(t for t in BUILTIN if t.resource.plural == "pods")
RULE = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}


def request(**labels: str) -> Request:
    obj = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": labels}, "spec": {}}
    return Request("CREATE", PODS, "x", "p", "", obj, None, None)


class Asked:
    """Hooks that answer as they are told, and what they were asked."""

    def __init__(self, **responses: Any) -> None:
        self.store = Store(":memory:")
        self.store.write(
            Key("/namespaces", "", "x"), {"metadata": {"name": "x", "labels": {"team": "a"}}}, None
        )
        self.responses = responses
        self.reviews: list[tuple[str, Object]] = []
        self.webhooks = Webhooks(self.store, self.ask)

    async def ask(self, url: str, name: str, tls: ssl.SSLContext, body: Object, seconds: float) -> Any:
        hook = url.rpartition("/")[2]
        self.reviews.append((hook, body))
        response = self.responses[hook]
        if isinstance(response, Exception):
            raise response
        uid = body["request"]["uid"]
        return {
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "response": {"uid": uid, **response},
        }

    def configure(self, kind: str, *names: str, **more: Any) -> None:
        hooks = [
            {
                "name": n,
                "rules": [RULE],
                "sideEffects": "None",
                "clientConfig": {"url": f"https://h/{n}"},
                **more,
            }
            for n in names
        ]
        plural = f"admissionregistration.k8s.io/{kind}webhookconfigurations"
        key = Key(plural, "", "-".join(names))
        self.store.write(key, {"metadata": {"name": key.name}, "webhooks": hooks}, None)


def patch(*operations: Object) -> Object:
    encoded = base64.b64encode(orjson.dumps(list(operations))).decode()
    return {"allowed": True, "patchType": "JSONPatch", "patch": encoded}


async def test_a_hook_is_sent_a_review_and_may_let_it_pass() -> None:
    asked = Asked(a={"allowed": True, "warnings": ["careful"]})
    asked.configure("validating", "a")
    made = request()
    await asked.webhooks.validate(made)
    ((_, body),) = asked.reviews
    sent = body["request"]
    assert (sent["operation"], sent["kind"]["kind"], sent["namespace"]) == ("CREATE", "Pod", "x")
    assert sent["object"]["metadata"]["name"] == "p" and sent["oldObject"] is None
    assert made.warnings == ["careful"]


async def test_a_hook_denies_in_its_own_words() -> None:
    asked = Asked(a={"allowed": False, "status": {"message": "no pods today", "code": 418}})
    asked.configure("validating", "a")
    with pytest.raises(StatusError) as refused:
        await asked.webhooks.validate(request())
    assert refused.value.code == 418
    assert refused.value.message == 'admission webhook "a" denied the request: no pods today'


async def test_patches_are_applied_one_after_another() -> None:
    asked = Asked(
        a=patch({"op": "add", "path": "/metadata/labels/one", "value": "1"}),
        b=patch({"op": "replace", "path": "/metadata/labels/one", "value": "2"}),
    )
    asked.configure("mutating", "a", "b")
    made = request(x="y")
    found = await asked.webhooks.mutate(made)
    assert asked.reviews[1][1]["request"]["object"]["metadata"]["labels"] == {"x": "y", "one": "1"}
    assert amended(request(x="y").obj or {}, found)["metadata"]["labels"] == {"x": "y", "one": "2"}


@pytest.mark.parametrize(
    "answer", [TimeoutError(), HookError("HTTP 500: broken"), {"uid": "other"}, {"allowed": True, "patch": "%"}]
)
@pytest.mark.parametrize("policy", ["Fail", "Ignore"])
async def test_a_hook_that_fails_is_ignored_or_not(answer: Any, policy: str) -> None:
    asked = Asked(a=answer)
    asked.configure("mutating", "a", failurePolicy=policy)
    if policy == "Ignore":
        assert await asked.webhooks.mutate(request()) == []
    else:
        with pytest.raises(StatusError, match='failed calling webhook "a"') as refused:
            await asked.webhooks.mutate(request())
        assert refused.value.code == 500


@pytest.mark.parametrize(
    ("more", "called"),
    [
        ({"objectSelector": {"matchLabels": {"app": "web"}}}, True),
        ({"objectSelector": {"matchLabels": {"app": "other"}}}, False),
        ({"namespaceSelector": {"matchLabels": {"team": "a"}}}, True),
        ({"namespaceSelector": {"matchLabels": {"team": "b"}}}, False),
        ({"rules": [{**RULE, "operations": ["UPDATE"]}]}, False),
        ({"rules": [{**RULE, "resources": ["pods/status"]}]}, False),
        ({"rules": [{**RULE, "apiGroups": ["*"], "resources": ["*"]}]}, True),
        ({"matchConditions": [{"name": "c", "expression": "object.metadata.name == 'p'"}]}, True),
        ({"matchConditions": [{"name": "c", "expression": "object.metadata.name == 'q'"}]}, False),
    ],
)
async def test_who_is_asked(more: Object, called: bool) -> None:
    asked = Asked(a={"allowed": True})
    asked.configure("validating", "a", **more)
    await asked.webhooks.validate(request(app="web"))
    assert bool(asked.reviews) is called


@pytest.mark.parametrize(("label", "called"), [("web", True), ("other", False)])
async def test_objects_in_no_namespace_are_chosen_by_their_own_labels(label: str, called: bool) -> None:
    asked = Asked(a={"allowed": True})
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["nodes"]}
    namespaces, objects = {"matchLabels": {"team": "b"}}, {"matchLabels": {"app": "web"}}
    asked.configure("validating", "a", rules=[rule], namespaceSelector=namespaces, objectSelector=objects)
    nodes = next(t for t in BUILTIN if t.resource.plural == "nodes")
    node = {"metadata": {"name": "n", "labels": {"app": label}}}
    await asked.webhooks.validate(Request("CREATE", nodes, "", "n", "", node, None, None))
    assert bool(asked.reviews) is called


async def test_an_earlier_hook_may_be_asked_again() -> None:
    asked = Asked(a={"allowed": True}, b=patch({"op": "add", "path": "/metadata/labels/b", "value": "1"}))
    asked.configure("mutating", "a", reinvocationPolicy="IfNeeded")
    asked.configure("mutating", "b")
    await asked.webhooks.mutate(request())
    assert [name for name, _ in asked.reviews] == ["a", "b", "a"]


async def test_a_hook_with_side_effects_has_no_part_in_a_dry_run() -> None:
    asked = Asked(a={"allowed": True})
    asked.configure("validating", "a", sideEffects="Some")
    made = request()
    made.dry_run = True
    with pytest.raises(StatusError, match="does not support dry run"):
        await asked.webhooks.validate(made)
