"""The verbs of the API on the store: what get, list, create, update, patch and delete mean.

No HTTP here: arguments are parsed, answers are objects, refusals are StatusError.
"""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass
from typing import Any

from meshlight.kube import objects, patch, service_addresses
from meshlight.kube.catalog import Catalog, ResourceType
from meshlight.kube.resources import Object
from meshlight.kube.selectors import Predicate, fields, labels
from meshlight.kube.status import (
    StatusError,
    already_exists,
    bad_request,
    conflict,
    not_found,
)
from meshlight.kube.store import ConflictError, Key, Store


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is about: a collection (no name), an object, or a subresource of one."""

    served: ResourceType
    namespace: str | None = None
    name: str = ""
    subresource: str = ""

    @property
    def key(self) -> Key:
        """The object's key in the store."""
        return Key(self.served.storage_key, self.namespace or "", self.name)

    def missing(self) -> StatusError:
        """404 for this object."""
        return not_found(self.served.resource.group, self.served.resource.plural, self.name)


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """Query parameters of a write."""

    dry_run: bool = False
    field_validation: str = "Warn"
    field_manager: str = ""


PATCH_TYPES = (
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
)


def matcher(label_selector: str, field_selector: str) -> Predicate:
    """A predicate of objects for both selectors. Raises StatusError 400."""
    try:
        by_label, by_field = labels(label_selector), fields(field_selector)
    except ValueError as error:
        raise bad_request(str(error)) from error
    return lambda obj: by_label(obj["metadata"].get("labels") or {}) and by_field(obj)


class Rest:
    """The verbs, over one store and catalog."""

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self.store = store
        self.catalog = catalog
        for crd in store.list("apiextensions.k8s.io/customresourcedefinitions"):
            catalog.add_crd(crd)

    def presented(self, served: ResourceType, obj: Object) -> Object:
        """An object as the version asked for: all versions of a kind share one schema."""
        obj["apiVersion"], obj["kind"] = served.resource.api_version, served.resource.kind
        return obj

    def core_object(self, plural: str, namespace: str, name: str) -> Object | None:
        """An object of the core group by name, or None."""
        return self.store.get(Key(f"/{plural}", namespace, name))

    def _complete_service(self, target: Target, obj: Object, old: Object | None) -> None:
        """Addresses and node ports of a Service that is about to be written. Raises StatusError 422."""
        if target.served.resource.kind == "Service":
            others = [
                other
                for other in self.store.list(target.served.storage_key)
                if (other["metadata"]["namespace"], other["metadata"]["name"])
                != (obj["metadata"]["namespace"], obj["metadata"]["name"])
            ]
            service_addresses.assign(obj, old, others)

    def get(self, target: Target) -> Object:
        """One object."""
        obj = self.store.get(target.key)
        if obj is None:
            raise target.missing()
        obj = self.presented(target.served, obj)
        return _scale(obj) if target.subresource == "scale" else obj

    def list(self, target: Target, matches: Predicate, limit: int, after: str) -> tuple[list[Object], str]:
        """Matching objects, and the continue token when there are more than `limit` (0: all)."""
        found: list[Object] = []
        for obj in self.store.list(target.served.storage_key, target.namespace, after):
            if not matches(obj):
                continue
            if limit and len(found) == limit:
                last = found[-1]["metadata"]
                return found, f"{last.get('namespace', '')}/{last['name']}"
            found.append(self.presented(target.served, obj))
        return found, ""

    def create(self, target: Target, obj: Any, options: WriteOptions) -> Object:
        """Create an object. Raises StatusError 400, 404 (namespace), 409, 422."""
        served = target.served
        objects.check_type(served, obj, target.namespace)
        if served.resource.namespaced:
            self._check_namespace(target)
        self._check_fields(served, obj, options)
        objects.new(obj, str(uuid.uuid4()))
        if served.has_status and served.resource.kind not in ("Node", "Pod"):
            obj.pop("status", None)
        objects.validate(served, obj)
        objects.apply_defaults(served, obj)
        self._complete_service(target, obj, None)
        if served.resource.kind == "CustomResourceDefinition":
            self._establish(obj)
        key = Key(served.storage_key, target.namespace or "", obj["metadata"]["name"])
        if options.dry_run:
            if self.store.get(key) is not None:
                raise already_exists(served.resource.group, served.resource.plural, key.name)
            checked: Object = obj
            return checked
        try:
            return self.store.write(key, obj, None)
        except ConflictError:
            raise already_exists(served.resource.group, served.resource.plural, key.name) from None

    def replace(self, target: Target, obj: Any, options: WriteOptions) -> Object:
        """PUT of an object or subresource. Raises StatusError 404, 409, 422."""
        old = self.store.get(target.key)
        if old is None:
            raise target.missing()
        objects.check_type(target.served, obj, target.namespace)
        stated = obj["metadata"].get("resourceVersion")
        if stated and stated != old["metadata"]["resourceVersion"]:
            raise self._conflict(target)
        return self._update(target, old, obj, options)

    def patch(self, target: Target, body: Any, content_type: str, options: WriteOptions) -> Object:
        """PATCH by JSON patch, merge patch or strategic merge patch."""
        if content_type not in PATCH_TYPES:
            known = ", ".join(PATCH_TYPES)
            raise StatusError(
                415,
                "UnsupportedMediaType",
                f"{content_type} patches (server-side apply) are not served yet; the API accepts {known}. "
                "Use `kubectl apply` without --server-side",
            )
        old = self.store.get(target.key)
        if old is None:
            raise target.missing()
        self.presented(target.served, old)
        base = copy.deepcopy(old)
        if target.subresource == "scale":
            body = {"spec": {"replicas": body["spec"]["replicas"]}}
        try:
            if content_type == "application/json-patch+json":
                obj = patch.json_patch(base, body)
            elif content_type == "application/strategic-merge-patch+json":
                obj = patch.strategic_merge(base, body)
            else:
                obj = patch.merge(base, body)
        except patch.PatchError as error:
            raise bad_request(str(error)) from error
        stated = obj["metadata"].get("resourceVersion")
        if stated and stated != old["metadata"]["resourceVersion"]:
            raise self._conflict(target)
        updated = self._update(target, old, obj, options)
        return _scale(updated) if target.subresource == "scale" else updated

    def delete(self, target: Target, body: Object, options: WriteOptions) -> Object:
        """DELETE: at once, or by marking when finalizers, a grace period or a namespace ask for it."""
        obj = self.store.get(target.key)
        if obj is None:
            raise target.missing()
        self.presented(target.served, obj)
        if options.dry_run:
            return obj
        metadata = obj["metadata"]
        grace = self._grace(obj, body)
        kind = target.served.resource.kind
        if metadata.get("finalizers") or grace or (kind == "Namespace" and obj["spec"]["finalizers"]):
            if "deletionTimestamp" not in metadata:
                metadata["deletionTimestamp"] = objects.now()
                metadata["deletionGracePeriodSeconds"] = grace
                if kind == "Namespace":
                    obj["status"] = {**obj.get("status", {}), "phase": "Terminating"}
                return self.store.write(target.key, obj, int(metadata["resourceVersion"]))
            return obj
        self._remove(target, obj)
        return obj

    def finalize(self, target: Target, obj: Any, options: WriteOptions) -> Object:
        """PUT `namespaces/NAME/finalize`."""
        return self.replace(target, obj, options)

    def bind(self, target: Target, binding: Object) -> None:
        """POST `pods/NAME/binding`: give a Pod its node."""
        pod = self.get(Target(target.served, target.namespace, target.name))
        if pod["spec"].get("nodeName"):
            raise StatusError(409, "Conflict", f"pod {target.name} is already assigned to a node")
        pod["spec"]["nodeName"] = binding["target"]["name"]
        conditions = [c for c in pod["status"].get("conditions") or [] if c["type"] != "PodScheduled"]
        conditions.append({"type": "PodScheduled", "status": "True", "lastTransitionTime": objects.now()})
        pod["status"]["conditions"] = conditions
        self.store.write(target.key, pod, int(pod["metadata"]["resourceVersion"]))

    def _update(self, target: Target, old: Object, obj: Object, options: WriteOptions) -> Object:
        served = target.served
        expected = int(old["metadata"]["resourceVersion"])
        updated = objects.update(served, copy.deepcopy(old), obj, target.subresource)
        if not target.subresource:
            self._check_fields(served, updated, options)
        objects.validate(served, updated)
        objects.apply_defaults(served, updated)
        if not target.subresource:
            self._complete_service(target, updated, old)
        self.presented(served, updated)
        if options.dry_run or updated == old:
            return updated
        if self._finished(updated):
            self._remove(target, updated)
            return updated
        if served.resource.kind == "CustomResourceDefinition":
            self._establish(updated)
        try:
            return self.store.write(target.key, updated, expected)
        except ConflictError:
            raise self._conflict(target) from None

    def _finished(self, obj: Object) -> bool:
        """Whether a marked object has nothing left that holds it."""
        metadata = obj["metadata"]
        if "deletionTimestamp" not in metadata or metadata.get("finalizers"):
            return False
        if obj["kind"] == "Namespace":
            return not obj["spec"].get("finalizers")
        return not metadata.get("deletionGracePeriodSeconds")

    def _remove(self, target: Target, obj: Object) -> None:
        if target.served.resource.kind == "CustomResourceDefinition":
            for served in self.catalog.types():
                if (served.resource.group, served.resource.plural) == (
                    obj["spec"]["group"],
                    obj["spec"]["names"]["plural"],
                ):
                    for instance in list(self.store.list(served.storage_key)):
                        metadata = instance["metadata"]
                        key = Key(served.storage_key, metadata.get("namespace", ""), metadata["name"])
                        self.store.delete(key, instance)
            self.catalog.remove_crd(obj)
        self.store.delete(target.key, obj)

    @staticmethod
    def _grace(obj: Object, body: Object) -> int:
        """Seconds of grace: only a Pod that a node has accepted has any."""
        if obj["kind"] != "Pod" or not obj["spec"].get("nodeName"):
            return 0
        if obj["status"].get("phase") in ("Succeeded", "Failed"):
            return 0
        asked = body.get("gracePeriodSeconds")
        return int(asked if asked is not None else obj["spec"]["terminationGracePeriodSeconds"])

    def _check_namespace(self, target: Target) -> None:
        namespace = self.store.get(Key("/namespaces", "", target.namespace or ""))
        if namespace is None:
            raise not_found("", "namespaces", target.namespace or "")
        if "deletionTimestamp" in namespace["metadata"]:
            raise StatusError(
                403,
                "Forbidden",
                f"unable to create new content in namespace {target.namespace} because it is being terminated",
            )

    @staticmethod
    def _check_fields(served: ResourceType, obj: Object, options: WriteOptions) -> None:
        if options.field_validation != "Strict" or not served.schema:
            return
        if unknown := objects.unknown_fields(obj, served.schema):
            listed = ", ".join(f'unknown field "{path}"' for path in unknown)
            raise bad_request(f"strict decoding error: {listed}")

    def _establish(self, crd: Object) -> None:
        """Serve a CustomResourceDefinition and say so in its conditions."""
        try:
            self.catalog.add_crd(crd)
        except (KeyError, TypeError) as error:
            raise bad_request(f"CustomResourceDefinition lacks {error}") from error
        crd["status"] = {
            "acceptedNames": crd["spec"]["names"],
            "storedVersions": [v["name"] for v in crd["spec"]["versions"] if v.get("storage")],
            "conditions": [
                {
                    "type": kind,
                    "status": "True",
                    "reason": reason,
                    "lastTransitionTime": objects.now(),
                }
                for kind, reason in (
                    ("NamesAccepted", "NoConflicts"),
                    ("Established", "InitialNamesAccepted"),
                )
            ],
        }

    def _conflict(self, target: Target) -> StatusError:
        return conflict(target.served.resource.group, target.served.resource.plural, target.name)


def _scale(obj: Object) -> Object:
    """An object as autoscaling/v1 Scale."""
    selector = ((obj["spec"].get("selector") or {}).get("matchLabels")) or {}
    metadata = {k: v for k, v in obj["metadata"].items() if k != "managedFields"}
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": metadata,
        "spec": {"replicas": obj["spec"].get("replicas", 1)},
        "status": {
            "replicas": (obj.get("status") or {}).get("replicas", 0),
            "selector": ",".join(f"{k}={v}" for k, v in selector.items()),
        },
    }
