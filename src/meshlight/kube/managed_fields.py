"""`metadata.managedFields`: which manager owns which fields, kept up by every write.

Pure; times come as arguments. What no manager can own (identity, revision, and `status` outside its
subresource) is left out before anything is compared.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from meshlight.kube import apply, field_sets
from meshlight.kube.apply import Manager, Owners
from meshlight.kube.field_sets import FieldSet
from meshlight.kube.resources import Object
from meshlight.kube.schema import Schema
from meshlight.kube.status import StatusError, bad_request

MAX_UPDATERS = 10
"""Updaters remembered one by one; the oldest beyond are merged into one entry."""

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_UNOWNED = frozenset(
    ("name", "namespace", "creationTimestamp", "selfLink", "uid", "generation", "managedFields",
     "resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds")
)  # fmt: skip


@dataclass(slots=True)
class Ownership:
    """The decoded `managedFields` of an object."""

    owners: Owners = field(default_factory=dict)
    times: dict[Manager, str] = field(default_factory=dict)
    versions: dict[Manager, str] = field(default_factory=dict)
    encoded: dict[Manager, tuple[FieldSet, Object]] = field(default_factory=dict)
    """The sets as they were read and their JSON, which serves again where nothing changed."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes, through which version and subresource of the object, and when."""

    name: str
    api_version: str
    time: str
    subresource: str = ""
    separate_status: bool = False
    """Whether `status` is written only through its subresource."""

    def manager(self, operation: str) -> Manager:
        """The writer as an owner of fields."""
        version = "" if operation == "Apply" else self.api_version
        return Manager(self.name, operation, self.subresource, version)


def read(entries: Any) -> Ownership:
    """Decode `managedFields`. Raises ValueError when an entry is malformed."""
    ownership = Ownership()
    for entry in entries or ():
        try:
            operation, version = entry["operation"], entry.get("apiVersion", "")
            manager = Manager(
                entry.get("manager", ""),
                operation,
                entry.get("subresource", ""),
                "" if operation == "Apply" else version,
            )
            tree = entry.get("fieldsV1") or {}
            fields = field_sets.from_json(tree)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"malformed entry of managedFields: {entry!r}") from error
        if operation not in ("Apply", "Update"):
            raise ValueError(f"unknown operation {operation!r} in managedFields")
        if manager in ownership.owners:
            fields |= ownership.owners[manager]
        else:
            ownership.encoded[manager] = (fields, tree)
        ownership.owners[manager] = fields
        ownership.versions[manager] = version
        if "time" in entry:
            ownership.times[manager] = entry["time"]
    return ownership


def encode(ownership: Ownership) -> list[Object]:
    """`managedFields`: appliers first, then by time and name."""
    entries = []
    for manager, owned in ownership.owners.items():
        entry: Object = {
            "manager": manager.name,
            "operation": manager.operation,
            "apiVersion": ownership.versions.get(manager, manager.api_version),
        }
        if manager in ownership.times:
            entry["time"] = ownership.times[manager]
        entry["fieldsType"] = "FieldsV1"
        before, tree = ownership.encoded.get(manager, (None, {}))
        entry["fieldsV1"] = tree if owned is before else field_sets.to_json(owned)
        if manager.subresource:
            entry["subresource"] = manager.subresource
        entries.append(entry)
    entries.sort(key=lambda e: (e["operation"], e.get("time", ""), e["manager"], e["apiVersion"]))
    return entries


def ownable(obj: Object, writer: Writer) -> Object:
    """The object without the fields that nobody owns, and those out of this writer's reach."""
    if writer.subresource == "status":
        return {"status": obj.get("status") or {}}
    left = {k: v for k, v in obj.items() if k not in ("apiVersion", "kind", "metadata")}
    if writer.separate_status:
        left.pop("status", None)
    left["metadata"] = {k: v for k, v in (obj.get("metadata") or {}).items() if k not in _UNOWNED}
    return left


def empty_of(schema: Schema) -> Object:
    """What an object of a built-in kind has before anything is set: the structs held by value."""
    return {
        name: [] if below.type == "array" else empty_of(below)
        for name, below in schema.properties.items()
        if below.inline
    }


def record_update(live: Object | None, new: Object, schema: Schema, writer: Writer) -> None:
    """Note in `new` that `writer` made it of `live` (None: created it)."""
    if live is None:
        before = ownable({"metadata": {}, **empty_of(schema)}, writer)
        entries, stated = None, None
    else:
        before = ownable(live, writer)
        entries, stated = live["metadata"].get("managedFields"), new["metadata"].get("managedFields")
    if writer.subresource or stated == entries:
        stated = None  # only a write of the object itself may edit the entries
    change = field_sets.difference(before, ownable(new, writer), schema)
    if not change and not stated:
        _put(new, entries)
        return
    ownership = _stated_or_live(stated, entries)
    if change:
        manager = writer.manager("Update")
        ownership.owners = apply.changed(ownership.owners, manager, change)
        if change.added or change.modified:
            ownership.times[manager] = writer.time
            ownership.versions[manager] = writer.api_version
        _cap(ownership)
    _put(new, encode(ownership))


def _stated_or_live(stated: Any, entries: Any) -> Ownership:
    """What a client wrote into managedFields; the live entries when it left them out or broke them.

    One empty entry means that nobody shall own anything.
    """
    if stated == [{}]:
        return Ownership()
    if stated:
        try:
            return read(stated)
        except ValueError:
            pass
    return _read_or_nothing(entries)


def _read_or_nothing(entries: Any) -> Ownership:
    try:
        return read(entries)
    except ValueError:
        return Ownership()


def _put(obj: Object, entries: Any) -> None:
    if entries:
        obj["metadata"]["managedFields"] = entries
    else:
        obj["metadata"].pop("managedFields", None)


def record_apply(live: Object | None, config: Object, schema: Schema, writer: Writer, *, force: bool) -> Object:
    """The object after `writer` applied `config` to `live` (None: there was none).

    Raises StatusError: 409 with the conflicts unless `force`, 400 for a malformed configuration.
    """
    if (config.get("metadata") or {}).get("managedFields"):
        raise bad_request("metadata.managedFields must be nil")
    manager = writer.manager("Apply")
    ownership = _before_first_apply(live, schema, writer)
    before = ownable(live, writer) if live is not None else {}
    given = ownable(config, writer)
    if not given.get("metadata", True):
        del given["metadata"]
    try:
        merged, owners = _apply(live, before, given, schema, ownership.owners, manager, force=force)
    except apply.ConflictsError as error:
        raise conflict(error, ownership) from None
    except field_sets.KeyMissingError as error:
        raise bad_request(f"failed to create typed patch object ({_described(config)}): {error}") from error
    merged.setdefault("metadata", {})
    if merged != {"metadata": {}, **before} or owners.get(manager) != ownership.owners.get(manager):
        ownership.times[manager] = writer.time
    ownership.owners = owners
    ownership.versions[manager] = writer.api_version
    result = _combined(live if live is not None else config, merged, writer)
    _sync_last_applied(live, config, result, writer)
    _put(result, encode(ownership))
    return result


def _before_first_apply(live: Object | None, schema: Schema, writer: Writer) -> Ownership:
    """The owners so far; all of an object that has none belongs to `before-first-apply`."""
    if live is None:
        return Ownership()
    ownership = _read_or_nothing(live["metadata"].get("managedFields"))
    if not ownership.owners:
        unknown = dataclasses.replace(writer, name="before-first-apply", subresource="")
        first = unknown.manager("Update")
        nothing = ownable({"metadata": {}, **empty_of(schema)}, unknown)
        ownership.owners = apply.update(nothing, ownable(live, unknown), schema, {}, first)
        ownership.times[first] = writer.time
        ownership.versions[first] = writer.api_version
    return ownership


def _apply(
    live: Object | None,
    before: Object,
    given: Object,
    schema: Schema,
    owners: Owners,
    manager: Manager,
    *,
    force: bool,
) -> tuple[Object, Owners]:
    """Apply; kubectl may take over fields that `kubectl apply` without --server-side gave before."""
    try:
        return apply.apply(before, given, schema, owners, manager, force=force)
    except apply.ConflictsError as error:
        text = ((live or {}).get("metadata", {}).get("annotations") or {}).get(LAST_APPLIED)
        if manager.name != "kubectl" or not text:
            raise
        try:
            last = field_sets.fields_of(orjson.loads(text), schema)
        except ValueError:
            raise error from None
        allowed: FieldSet = last | {("f:metadata", "f:annotations", "f:" + LAST_APPLIED)}
        if any(owned - allowed for owned in error.conflicts.values()):
            raise
        return apply.apply(before, given, schema, owners, manager, force=True)


def _combined(base: Object, merged: Object, writer: Writer) -> Object:
    """`base` with the ownable part replaced by what was merged."""
    if writer.subresource == "status":
        return {**base, "metadata": dict(base["metadata"]), "status": merged.get("status", {})}
    kept = {k: v for k, v in (base.get("metadata") or {}).items() if k in _UNOWNED}
    result: Object = {k: base[k] for k in ("apiVersion", "kind") if k in base}
    result.update(merged)
    result["metadata"] = {**kept, **merged["metadata"]}
    if writer.separate_status and "status" in base:
        result["status"] = base["status"]
    return result


def _sync_last_applied(live: Object | None, config: Object, result: Object, writer: Writer) -> None:
    """Keep the annotation of client-side apply true, for a later `kubectl apply` without --server-side."""
    if writer.name == "kubectl" and live is not None:
        annotations = live["metadata"].get("annotations") or {}
        if LAST_APPLIED in annotations:
            kept = {**(result["metadata"].get("annotations") or {})}
            kept[LAST_APPLIED] = orjson.dumps(_without_annotation(config)).decode() + "\n"
            result["metadata"]["annotations"] = kept


def _without_annotation(config: Object) -> Object:
    bare = copy.deepcopy(config)
    (bare.get("metadata") or {}).get("annotations", {}).pop(LAST_APPLIED, None)
    return bare


def _cap(ownership: Ownership) -> None:
    """Merge the oldest updaters into one when there are too many."""
    updaters = [m for m in ownership.owners if m.operation == "Update"]
    if len(updaters) <= MAX_UPDATERS:
        return
    updaters.sort(key=lambda m: ownership.times.get(m, ""))
    for oldest in updaters[: len(updaters) - MAX_UPDATERS + 1]:
        ancient = Manager("ancient-changes", "Update", oldest.subresource, oldest.api_version)
        owned = ownership.owners.pop(oldest)
        ownership.owners[ancient] = ownership.owners.get(ancient, field_sets.EMPTY) | owned
        ownership.times[ancient] = ownership.times.get(oldest, "")
        ownership.versions[ancient] = oldest.api_version


def _described(config: Object) -> str:
    metadata = config.get("metadata") or {}
    name = f"{metadata.get('namespace', '')}/{metadata.get('name', '')}"
    return f"{name}; {config.get('apiVersion')}, Kind={config.get('kind')}"


def conflict(error: apply.ConflictsError, ownership: Ownership) -> StatusError:
    """409 with a cause for each field that belongs to another manager."""
    found = [(m, path) for m in sorted(error.conflicts) for path in sorted(error.conflicts[m])]
    causes = [
        {
            "reason": "FieldManagerConflict",
            "message": f"conflict with {_named(manager)}",
            "field": field_sets.shown(path),
        }
        for manager, path in found
    ]
    if len(found) == 1:
        listed = f"1 conflict: conflict with {_named(found[0][0])}: {causes[0]['field']}"
    else:
        listed = f"{len(found)} conflicts: " + "\n".join(_listed(error.conflicts))
    return StatusError(409, "Conflict", f"Apply failed with {listed}", {"causes": causes})


def _listed(conflicts: dict[Manager, FieldSet]) -> Iterable[str]:
    for manager in sorted(conflicts):
        yield f"conflicts with {_named(manager)}:"
        for path in sorted(conflicts[manager]):
            yield f"- {field_sets.shown(path)}"


def _named(manager: Manager) -> str:
    text = f'"{manager.name}"'
    if manager.subresource:
        text += f' with subresource "{manager.subresource}"'
    return text if manager.operation == "Apply" else f"{text} using {manager.api_version}"
