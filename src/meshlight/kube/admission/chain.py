"""The plug-ins that every API server has, in order."""

from __future__ import annotations

from meshlight.kube.admission import Admission
from meshlight.kube.admission.classes import DefaultStorage, Priorities
from meshlight.kube.admission.limit_ranges import LimitRanges
from meshlight.kube.admission.policies import Policies
from meshlight.kube.admission.quotas import Quotas
from meshlight.kube.admission.role_grants import RoleGrants
from meshlight.kube.authorization import Authorizer
from meshlight.kube.catalog import Catalog
from meshlight.kube.resources import Object
from meshlight.kube.selectors import match_labels
from meshlight.kube.status import StatusError
from meshlight.kube.store import Key, Store


def builtin(store: Store, catalog: Catalog, authorizer: Authorizer) -> Admission:
    """Admission over stored objects; quotas come last, as in Kubernetes."""
    limits = LimitRanges(store)

    def params(policy: Object, binding: Object, namespace: str) -> list[Object] | None:
        return parameters(store, catalog, policy, binding, namespace)

    return Admission(
        mutating=(limits.mutate, Priorities(store), DefaultStorage(store)),
        validating=(limits.validate, RoleGrants(authorizer), Policies(store, params), Quotas(store)),
    )


def parameters(
    store: Store, catalog: Catalog, policy: Object, binding: Object, namespace: str
) -> list[Object] | None:
    """The parameter objects of a policy by its binding; None when it takes none. Raises StatusError 403."""
    kind, reference = policy["spec"].get("paramKind"), (binding.get("spec") or {}).get("paramRef")
    if not kind or not reference:
        return None
    served = catalog.by_kind(kind.get("apiVersion", ""), kind.get("kind", ""))
    found: list[Object] = []
    if served is not None:
        where = reference.get("namespace") or (namespace if served.resource.namespaced else "")
        if name := reference.get("name"):
            obj = store.get(Key(served.storage_key, where, name))
            found = [obj] if obj is not None else []
        else:
            selector = reference.get("selector") or {}
            found = [
                obj for obj in store.objects(served.storage_key, where or None)
                if match_labels(selector, obj["metadata"].get("labels") or {})
            ]  # fmt: skip
    if not found and reference.get("parameterNotFoundAction", "Deny") == "Deny":
        message = "no params found for policy binding with `Deny` parameterNotFoundAction"
        raise StatusError(403, "Forbidden", f"{message}: {binding['metadata']['name']}")
    return found
