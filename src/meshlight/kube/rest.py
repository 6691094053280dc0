"""The verbs of the API on the store: what get, list, create, update, patch and delete mean.

No HTTP here: arguments are parsed, answers are objects, refusals are StatusError.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from meshlight.kube import (
    conversion,
    definitions,
    deletion,
    managed_fields,
    objects,
    patch,
    role_aggregation,
    scale,
    service_addresses,
    validation,
)
from meshlight.kube.admission import Operation, Request
from meshlight.kube.admission.chain import builtin
from meshlight.kube.authentication import User
from meshlight.kube.authorization import Authorizer
from meshlight.kube.catalog import Catalog, ResourceType
from meshlight.kube.resources import Object
from meshlight.kube.status import (
    Cause,
    StatusError,
    already_exists,
    bad_request,
    conflict,
    forbidden,
    invalid,
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
    """Query parameters of a write; `warnings` collects what the answer's Warning headers shall say."""

    dry_run: bool = False
    field_validation: str = "Warn"
    field_manager: str = ""
    force: bool = False
    duplicates: tuple[str, ...] = ()
    user: User | None = None
    amend: Callable[[Object], Object] | None = None
    """What webhooks change of the object, after the server's own admission."""
    seen: list[Request] | None = None
    """Collects the request as admission saw it last."""
    warnings: list[str] = field(default_factory=list)


JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
PATCH_TYPES = (JSON_PATCH, MERGE_PATCH, STRATEGIC_MERGE_PATCH, APPLY_PATCH)


class Rest:
    """The verbs, over one store and catalog."""

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self.store = store
        self.catalog = catalog
        self.authorizer = Authorizer(self.rbac_objects)
        self.admission = builtin(store, catalog, self.authorizer)
        self._rbac: dict[tuple[str, str | None], tuple[int, list[Object]]] = {}
        for crd in store.objects("apiextensions.k8s.io/customresourcedefinitions"):
            catalog.add_crd(crd)

    def presented(self, served: ResourceType, obj: Object) -> Object:
        """An object as the version asked for: all versions of a custom resource share one schema."""
        if served.stored_as:
            return conversion.convert(obj, served.resource.api_version)
        obj["apiVersion"], obj["kind"] = served.resource.api_version, served.resource.kind
        if served.schema is not None and not served.storage_version:
            objects.decode(served, obj)  # this version's fields and defaults, as Kubernetes reads objects
            objects.apply_defaults(served, obj)
        return obj

    def _stored(self, served: ResourceType) -> ResourceType:
        """The type in whose version this type's objects are stored."""
        group, _, plural = served.stored_as.partition("/")
        found = (t for t in self.catalog.types() if t.resource.group == group and t.resource.plural == plural)
        return next(t for t in found if not t.stored_as)

    def _through(self, target: Target, obj: Any, options: WriteOptions) -> tuple[Target, Object]:
        """A body in a version that is not stored, and its target, in the one that is."""
        objects.check_type(target.served, obj, target.namespace)
        self._decode(target, obj, options)
        stored = self._stored(target.served)
        objects.apply_defaults(target.served, obj)
        return replace(target, served=stored), conversion.convert(obj, stored.resource.api_version)

    def core_object(self, plural: str, namespace: str, name: str) -> Object | None:
        """An object of the core group by name, or None."""
        return self.store.get(Key(f"/{plural}", namespace, name))

    def rbac_objects(self, plural: str, namespace: str | None) -> Iterable[Object]:
        """Stored Roles, ClusterRoles or bindings of them, decoded once for each change; not to be changed."""
        resource = f"rbac.authorization.k8s.io/{plural}"
        latest = self.store.latest(resource)
        known = self._rbac.get((plural, namespace))
        if known is None or known[0] != latest:
            known = self._rbac[plural, namespace] = (latest, list(self.store.objects(resource, namespace)))
        return known[1]

    def _complete_service(self, target: Target, obj: Object, old: Object | None) -> None:
        """Addresses and node ports of a Service that is about to be written. Raises StatusError 422."""
        if target.served.resource.kind == "Service":
            others = [
                other
                for other in self.store.objects(target.served.storage_key)
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
        return scale.of(obj, target.served.scale) if target.subresource == "scale" else obj

    def create(self, target: Target, obj: Any, options: WriteOptions) -> Object:
        """Create an object. Raises StatusError 400, 404 (namespace), 409, 422."""
        if target.served.stored_as:
            through, converted = self._through(target, obj, options)
            return self.presented(target.served, self.create(through, converted, options))
        objects.check_type(target.served, obj, target.namespace)
        self._decode(target, obj, options)
        return self._create(target, obj, options, applied=False)

    def _create(self, target: Target, obj: Object, options: WriteOptions, *, applied: bool) -> Object:
        served = target.served
        if served.schema is not None:
            self._check_definition(served)
        objects.new(obj, str(uuid.uuid4()))
        if served.resource.namespaced:
            self._check_namespace(target, obj["metadata"].get("name", ""))
        if served.has_status and served.resource.kind not in ("Node", "Pod"):
            obj.pop("status", None)
        objects.apply_defaults(served, obj, created=True)
        request = _request("CREATE", target, obj, None, options)
        self.admission.mutate(request)
        obj = _amended(request, obj, options)
        objects.set_generation(served, None, obj)
        objects.validate(served, obj)
        options.warnings.extend(validation.warnings(obj))
        self._admit(request, options)
        if not applied:
            managed_fields.record_update(None, obj, served.structure, _writer(target, options))
        self._complete_service(target, obj, None)
        key = Key(served.storage_key, target.namespace or "", obj["metadata"]["name"])
        if options.dry_run:
            if self.store.get(key) is not None:
                raise already_exists(served.resource.group, served.resource.plural, key.name)
            return obj
        if served.resource.kind == definitions.KIND:
            definitions.establish(self.catalog, obj, None)
        try:
            return self._write(served, key, obj, None)
        except ConflictError:
            raise already_exists(served.resource.group, served.resource.plural, key.name) from None

    def replace(self, target: Target, obj: Any, options: WriteOptions) -> Object:
        """PUT of an object or subresource. Raises StatusError 404, 409, 422."""
        if target.served.stored_as:
            through, converted = self._through(target, obj, options)
            return self.presented(target.served, self.replace(through, converted, options))
        old = self.store.get(target.key)
        if old is None:
            raise target.missing()
        self.presented(target.served, old)
        if target.subresource == "scale":
            return self._scale(target, old, obj, options)
        objects.check_type(target.served, obj, target.namespace)
        _check_name(target, obj)
        self._decode(target, obj, options)
        return self._update(target, old, obj, options, applied=False)

    def _scale(self, target: Target, old: Object, wanted: Any, options: WriteOptions) -> Object:
        """Write an object's replicas by a Scale."""
        paths = target.served.scale
        written = scale.written(old, wanted, paths)
        return scale.of(self._update(target, old, written, options, applied=False), paths)

    def patch(self, target: Target, body: Any, content_type: str, options: WriteOptions) -> tuple[Object, bool]:
        """PATCH of any type; also says whether an apply created the object.

        Raises StatusError 400, 404, 409, 415, 422.
        """
        served = target.served
        known = [t for t in PATCH_TYPES if served.schema is None or t != STRATEGIC_MERGE_PATCH]
        if content_type not in known:
            message = "the body of the request was in an unknown format - accepted media types include: "
            message += ", ".join(known)
            raise StatusError(415, "UnsupportedMediaType", message)
        if content_type == APPLY_PATCH:
            return self._apply(target, body, options)
        if options.force:
            detail = "Forbidden: may not be specified for non-apply patch"
            raise _invalid_option("force", "FieldValueForbidden", detail)
        old = self.store.get(target.key)
        if old is None:
            raise target.missing()
        if served.stored_as:
            shown = self.presented(served, old)
            changed = patch.patched(shown, body, content_type, served.structure)
            return self.replace(target, changed, options), False
        self.presented(served, old)
        base = scale.of(old, served.scale) if target.subresource == "scale" else _copy(old)
        obj = patch.patched(base, body, content_type, served.structure)
        if target.subresource == "scale":
            return self._scale(target, old, obj, options), False
        objects.check_type(served, obj, target.namespace)
        _check_name(target, obj)
        self._decode(target, obj, options)
        return self._update(target, old, obj, options, applied=False), False

    def _apply(self, target: Target, config: Any, options: WriteOptions) -> tuple[Object, bool]:
        """Server-side apply: create the object, or merge the configuration into it."""
        if target.served.stored_as:
            through, converted = self._through(target, config, options)
            result, is_new = self._apply(through, converted, options)
            return self.presented(target.served, result), is_new
        served, structure = target.served, target.served.structure
        if not options.field_manager:
            detail = "Required value: is required for apply patch"
            raise _invalid_option("fieldManager", "FieldValueRequired", detail)
        if target.subresource == "scale":
            raise bad_request(
                "server-side apply to scale is not served: patch spec.replicas of the Scale instead"
            )
        if not isinstance(config, dict) or not config.get("apiVersion") or not config.get("kind"):
            raise bad_request("the applied configuration must have apiVersion and kind")
        objects.check_type(served, config, target.namespace)
        config["metadata"].setdefault("name", target.name)
        _check_name(target, config)
        self._decode(target, config, options)
        old = self.store.get(target.key)
        writer = _writer(target, options)
        stated = config["metadata"].pop("resourceVersion", None)
        if old is None:
            if target.subresource or stated:
                raise target.missing() if target.subresource else self._conflict(target)
            created = managed_fields.record_apply(None, config, structure, writer, force=options.force)
            return self._create(target, created, options, applied=True), True
        self.presented(served, old)
        if stated and stated != old["metadata"]["resourceVersion"]:
            raise self._conflict(target)
        if config["metadata"].get("uid") not in (None, old["metadata"]["uid"]):
            given, actual = config["metadata"]["uid"], old["metadata"]["uid"]
            detail = f"UID in precondition: {given}, UID in object meta: {actual}"
            raise objects.precondition_failed(served, old, detail)
        applied = managed_fields.record_apply(_copy(old), config, structure, writer, force=options.force)
        return self._update(target, old, applied, options, applied=True), False

    def delete(
        self, target: Target, options: deletion.DeleteOptions, write: WriteOptions | None = None
    ) -> tuple[Object, bool]:
        """DELETE: at once (True), or by marking what finalizers, grace or a namespace's contents hold."""
        obj = self.store.get(target.key)
        if obj is None:
            raise target.missing()
        self.presented(target.served, obj)
        deletion.check(target.served, obj, options)
        write = write or WriteOptions()
        self._admit(_request("DELETE", target, None, obj, write), write)
        before = orjson.dumps(obj)
        held = deletion.mark(obj, options, objects.now())
        if options.dry_run:
            return obj, not held
        if not held:
            self._remove(target, obj)
            return obj, True
        if orjson.dumps(obj) == before:
            return obj, False
        is_definition = target.served.resource.kind == definitions.KIND
        if is_definition:
            definitions.condition(obj, "Terminating", "True", "InstanceDeletionPending", _DELETING)
        expected = int(obj["metadata"]["resourceVersion"])
        stored = self._write(target.served, target.key, obj, expected)
        if is_definition:
            self._delete_instances(stored, options)
            left = self.store.get(target.key)
            if left is not None:
                self._release(left)
            return stored, self.store.body(target.key) is None
        return stored, False

    def finalize(self, target: Target, obj: Any, options: WriteOptions) -> Object:
        """PUT `namespaces/NAME/finalize`."""
        return self.replace(target, obj, options)

    def _update(
        self, target: Target, old: Object, obj: Object, options: WriteOptions, *, applied: bool
    ) -> Object:
        """Store `obj` in place of `old`; nothing is written when nothing changes."""
        served, subresource = target.served, target.subresource
        stated = obj["metadata"].get("resourceVersion")
        if stated and stated != old["metadata"]["resourceVersion"]:
            raise self._conflict(target)
        entries = obj["metadata"].get("managedFields")
        updated = objects.update(served, old, obj, subresource)
        objects.apply_defaults(served, updated)
        request = _request("UPDATE", target, updated, old, options)
        self.admission.mutate(request)
        updated = _amended(request, updated, options)
        objects.set_generation(served, old, updated)
        objects.validate(served, updated, old, subresource)
        self._admit(request, options)
        if not subresource:
            options.warnings.extend(validation.warnings(updated))
        if applied:
            updated["metadata"]["managedFields"] = entries
        else:
            managed_fields.record_update(old, updated, served.structure, _writer(target, options))
        if not subresource:
            self._complete_service(target, updated, old)
        self.presented(served, updated)
        if updated == old or options.dry_run:
            return updated
        if self._finished(updated):
            self._remove(target, updated)
            return updated
        if served.resource.kind == definitions.KIND and subresource != "status":
            definitions.establish(self.catalog, updated, old)
        try:
            return self._write(served, target.key, updated, int(old["metadata"]["resourceVersion"]))
        except ConflictError:
            raise self._conflict(target) from None

    def _write(self, served: ResourceType, key: Key, obj: Object, expected: int | None) -> Object:
        """Store an object, in the version that is stored and with its type first. Raises ConflictError."""
        version = self.catalog.stored_version(served)
        typed = {"apiVersion": version, "kind": served.resource.kind}
        stored = self.store.write(key, {**typed, **obj, **typed}, expected)
        if served.resource.kind == "ClusterRole":
            self._aggregate_roles()
        return stored if version == served.resource.api_version else self.presented(served, stored)

    def _admit(self, request: Request, options: WriteOptions) -> None:
        """The last word before a write. Raises StatusError."""
        self.admission.validate(request)
        if options.seen is not None:
            options.seen.append(request)

    def _aggregate_roles(self) -> None:
        """Bring the roles that are made of others up to date; roles may be made of such roles in turn."""
        resource = "rbac.authorization.k8s.io/clusterroles"
        for _ in range(_ROLES_OF_ROLES):
            changed = role_aggregation.outdated(self.rbac_objects("clusterroles", None))
            for role, rules in changed:
                expected = int(role["metadata"]["resourceVersion"])
                made = {**role, "metadata": dict(role["metadata"]), "rules": rules}
                self.store.write(Key(resource, "", role["metadata"]["name"]), made, expected)
            if not changed:
                return

    def _finished(self, obj: Object) -> bool:
        """Whether a marked object has nothing left that holds it."""
        metadata = obj["metadata"]
        if "deletionTimestamp" not in metadata or metadata.get("finalizers"):
            return False
        if obj["kind"] == "Namespace":
            return not obj["spec"].get("finalizers")
        return not metadata.get("deletionGracePeriodSeconds")

    def _remove(self, target: Target, obj: Object) -> None:
        """Remove an object; a definition takes its kind with it, and goes itself with its last object."""
        served = target.served
        if served.resource.kind == definitions.KIND:
            self.catalog.remove_crd(obj)
        self.store.delete(target.key, obj)
        if served.resource.kind == "ClusterRole":
            self._aggregate_roles()
        if served.schema is not None:
            definition = self.store.get(Key(definitions.RESOURCE, "", definitions.name_of(served)))
            if definition is not None and "deletionTimestamp" in definition["metadata"]:
                self._release(definition)

    def _delete_instances(self, crd: Object, options: deletion.DeleteOptions) -> None:
        """Delete every object of a definition that is about to go."""
        for served in definitions.types_of(self.catalog, crd):
            for (namespace, name), _ in self.store.bodies(served.storage_key):
                instance = Target(served, namespace or None, name)
                with contextlib.suppress(StatusError):  # gone with an earlier version
                    self.delete(
                        instance, replace(options, uid="", resource_version="", propagation="Background")
                    )

    def _release(self, crd: Object) -> None:
        """Let a definition go once nothing of its kind is left."""
        types = list(definitions.types_of(self.catalog, crd))
        if any(self.store.bodies(served.storage_key) for served in types):
            return
        metadata = crd["metadata"]
        finalizers = [f for f in metadata.get("finalizers") or () if f != definitions.CLEANUP]
        metadata["finalizers"] = finalizers
        served = self.catalog.lookup("apiextensions.k8s.io", "v1", "customresourcedefinitions")
        assert served is not None
        key = Key(definitions.RESOURCE, "", metadata["name"])
        if finalizers:
            self._write(served, key, crd, int(metadata["resourceVersion"]))
        else:
            self.catalog.remove_crd(crd)
            self.store.delete(key, crd)

    def _check_namespace(self, target: Target, name: str) -> None:
        namespace = self.store.get(Key("/namespaces", "", target.namespace or ""))
        if namespace is None:
            raise not_found("", "namespaces", target.namespace or "")
        if "deletionTimestamp" in namespace["metadata"]:
            r = target.served.resource
            because = f"namespace {target.namespace} because it is being terminated"
            raise forbidden(r.group, r.plural, name, f"unable to create new content in {because}")

    def _check_definition(self, served: ResourceType) -> None:
        definition = self.store.get(Key(definitions.RESOURCE, "", definitions.name_of(served)))
        if definition is not None and "deletionTimestamp" in definition["metadata"]:
            message = "create not allowed while custom resource definition is terminating"
            raise StatusError(405, "MethodNotAllowed", message)

    @staticmethod
    def _decode(target: Target, obj: Object, options: WriteOptions) -> None:
        """Drop undeclared fields; refuse or warn of them as the client asks. Raises StatusError 400."""
        problems = [f'duplicate field "{path}"' for path in options.duplicates]
        problems += [f'unknown field "{path}"' for path in objects.decode(target.served, obj)]
        if problems and options.field_validation == "Strict":
            raise bad_request(f"strict decoding error: {', '.join(problems)}")
        if problems and options.field_validation != "Ignore":
            options.warnings.extend(problems)

    def _conflict(self, target: Target) -> StatusError:
        return conflict(target.served.resource.group, target.served.resource.plural, target.name)


_ROLES_OF_ROLES = 10
"""How deep aggregated ClusterRoles may be made of aggregated ones."""
_DELETING = "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon"


def _copy(obj: Object) -> Object:
    copied: Object = orjson.loads(orjson.dumps(obj))
    return copied


def _request(
    operation: Operation, target: Target, obj: Object | None, old: Object | None, options: WriteOptions
) -> Request:
    name = target.name or (obj or {})["metadata"].get("name") or ""
    return Request(
        operation,
        target.served,
        target.namespace or "",
        name,
        target.subresource,
        obj,
        old,
        options.user,
        options.dry_run,
        options.warnings,
    )


def _amended(request: Request, obj: Object, options: WriteOptions) -> Object:
    """The object with what webhooks change of it, complete again."""
    if options.amend is None:
        return obj
    request.obj = options.amend(obj)
    objects.apply_defaults(request.served, request.obj)
    return request.obj


def _writer(target: Target, options: WriteOptions) -> managed_fields.Writer:
    served = target.served
    return managed_fields.Writer(
        options.field_manager or "unknown",
        served.resource.api_version,
        objects.now(),
        target.subresource,
        served.has_status,
    )


def _check_name(target: Target, obj: Object) -> None:
    name = obj["metadata"].get("name")
    if name != target.name:
        raise bad_request(
            f"the name of the object ({name or ''}) does not match the name on the URL ({target.name})"
        )


def _invalid_option(option: str, reason: str, message: str) -> StatusError:
    return invalid("meta.k8s.io", "PatchOptions", "", [Cause(option, reason, message)])
