"""Which identities a node proxy may ask certificates for: those of pods on its own node, no others.

A stolen node credential is then worth no more than that node. The rule is Istio's node authorizer:
the caller's service account must be trusted, its token must be of a pod that runs, and a pod of the
wanted identity must run on the same node. An identity whose service account was deleted is refused at once,
whatever still runs as it. Pure; fed with changes of pods and service accounts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.identity import Caller, Identity
from meshlight.controlplane.settings import ServiceAccount
from meshlight.kube.resources import Object


class Forbidden(Exception):
    """The caller may not have that identity; the message says why."""


@dataclass(frozen=True, slots=True)
class _Placement:
    uid: str
    node: str
    service_account: ServiceAccount


class NodeAuthorizer:
    """Service accounts by node, from the pods that have not ended."""

    def __init__(self, trust_domain: str, trusted: frozenset[ServiceAccount]) -> None:
        self._trust_domain = trust_domain
        self._trusted = trusted
        self._pods: dict[ObjectKey, _Placement] = {}
        self._running: Counter[tuple[str, ServiceAccount]] = Counter()
        self._accounts: set[ServiceAccount] | None = None

    def observe(self, key: ObjectKey, obj: Object | None) -> None:
        """Take a pod's present state, None once it is deleted."""
        new = None if obj is None else _placement(key, obj)
        old = self._pods.pop(key, None)
        if old is not None:
            self._running[old.node, old.service_account] -= 1
            if not self._running[old.node, old.service_account]:
                del self._running[old.node, old.service_account]
        if new is not None:
            self._pods[key] = new
            self._running[new.node, new.service_account] += 1

    def observe_account(self, key: ObjectKey, exists: bool) -> None:
        """Take a service account's existence. Before the first is heard of, none is missed."""
        if self._accounts is None:
            self._accounts = set()
        account = ServiceAccount(key.namespace, key.name)
        if exists:
            self._accounts.add(account)
        else:
            self._accounts.discard(account)

    def check_account(self, account: ServiceAccount) -> None:
        """Raise Forbidden when the service account does not exist (any more)."""
        if self._accounts is not None and account not in self._accounts:
            raise Forbidden(f"service account {account} does not exist")

    def set_trust_domain(self, trust_domain: str) -> None:
        """Certify for another trust domain from now on."""
        self._trust_domain = trust_domain

    def authorize(self, caller: Caller, wanted: Identity) -> None:
        """Raise Forbidden unless the caller may have a certificate of `wanted`."""
        account = caller.service_account
        if account not in self._trusted:
            raise Forbidden(f"service account {account} may not ask for other identities")
        if wanted.trust_domain != self._trust_domain:
            raise Forbidden(f"trust domain {wanted.trust_domain!r} is not this mesh's, {self._trust_domain!r}")
        self.check_account(wanted.service_account)
        node = self._node_of(caller)
        if not self._running[node, wanted.service_account]:
            raise Forbidden(f"no pod of service account {wanted.service_account} runs on node {node!r}")

    def _node_of(self, caller: Caller) -> str:
        if not caller.pod_name:
            raise Forbidden("the token is bound to no pod: use a projected service-account token")
        key = ObjectKey(caller.service_account.namespace, caller.pod_name)
        pod = self._pods.get(key)
        if pod is None or pod.uid != caller.pod_uid:
            raise Forbidden(f"pod {key} with uid {caller.pod_uid!r} is not known to run; try again")
        if pod.service_account != caller.service_account:
            raise Forbidden(f"pod {key} does not run as {caller.service_account}")
        if caller.node_name and caller.node_name != pod.node:
            raise Forbidden(f"the token is of node {caller.node_name!r}, but pod {key} runs on {pod.node!r}")
        return pod.node


def _placement(key: ObjectKey, obj: Object) -> _Placement | None:
    spec = obj.get("spec") or {}
    node = spec.get("nodeName")
    if not node or (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return None
    account = ServiceAccount(key.namespace, spec.get("serviceAccountName") or "default")
    return _Placement(obj["metadata"].get("uid", ""), node, account)
