"""Server-side apply: merging a configuration into an object and deciding who owns which field.

Pure. Follows structured-merge-diff: a manager's configuration is merged by the schema's list and map types;
fields that the manager gave before and no longer gives go away unless another manager owns them; a field
that another manager owns with another value is a conflict.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshlight.kube import field_sets
from meshlight.kube.field_sets import EMPTY, FieldSet, Path
from meshlight.kube.resources import Object
from meshlight.kube.schema import ANY, Schema


@dataclass(frozen=True, slots=True, order=True)
class Manager:
    """Who owns fields: an applier is one whatever its version, an updater one for each version."""

    name: str
    operation: str
    subresource: str = ""
    api_version: str = ""


Owners = dict[Manager, FieldSet]


class ConflictsError(Exception):
    """Fields of the configuration belong to others, who gave them other values."""

    def __init__(self, conflicts: Mapping[Manager, FieldSet]) -> None:
        super().__init__("apply conflicts")
        self.conflicts = dict(conflicts)


def apply(
    live: Object, config: Object, schema: Schema, owners: Owners, manager: Manager, *, force: bool
) -> tuple[Object, Owners]:
    """The object after `manager` applied `config`, and the owners then.

    Raises ConflictsError unless `force`, and field_sets.KeyMissingError on a malformed list.
    """
    given = field_sets.fields_of(config, schema)
    merged = merge(live, config, schema)
    before = owners.get(manager, EMPTY)
    owners = {**owners, manager: given}
    if before - given:
        # Merged anew for the lists and maps that the configuration gives empty: nobody owns those.
        merged = merge(_prune(merged, schema, owners, before), config, schema)
    return merged, transfer(live, merged, schema, owners, manager, force=force)


def update(live: Object, new: Object, schema: Schema, owners: Owners, manager: Manager) -> Owners:
    """The owners after `manager` wrote `new` over `live`: it owns what it changed."""
    return changed(owners, manager, field_sets.difference(live, new, schema))


def changed(owners: Owners, manager: Manager, change: field_sets.Difference) -> Owners:
    """The owners after `manager` made that change."""
    owners = _transferred(owners, manager, change, force=True)
    own = (owners.get(manager, EMPTY) - change.removed) | change.modified | change.added
    return _without_empty({**owners, manager: own})


def transfer(
    live: Object, new: Object, schema: Schema, owners: Owners, manager: Manager, *, force: bool
) -> Owners:
    """The owners after others than `manager` lost what it changed. Raises ConflictsError unless `force`."""
    change = field_sets.difference(live, new, schema)
    return _without_empty(_transferred(owners, manager, change, force=force))


def _transferred(owners: Owners, manager: Manager, change: field_sets.Difference, *, force: bool) -> Owners:
    taken = change.modified | change.added
    result, conflicts = dict(owners), {}
    for other, owned in owners.items():
        if other == manager:
            continue
        if lost := owned & taken:
            conflicts[other] = lost
        if gone := lost | (owned & change.removed):
            result[other] = owned - gone
    if conflicts and not force:
        raise ConflictsError(conflicts)
    return result


def _without_empty(owners: Owners) -> Owners:
    return {manager: owned for manager, owned in owners.items() if owned}


def merge(live: Any, config: Any, schema: Schema) -> Any:
    """The value with the configuration's fields in it; shares nothing with `config`."""
    if isinstance(live, dict) and isinstance(config, dict) and schema.map_type != "atomic":
        result = dict(live)
        for name, child in config.items():
            below = schema.member(name) or ANY
            result[name] = merge(live[name], child, below) if name in live else copy.deepcopy(child)
        return result
    if isinstance(live, list) and isinstance(config, list) and schema.list_type != "atomic":
        return _merge_list(live, config, schema)
    return copy.deepcopy(config)


def _merge_list(live: list[Any], config: list[Any], schema: Schema) -> list[Any]:
    """Applied elements in their order; an element of others stays before the applied ones it preceded."""
    before = field_sets.elements_of(live, schema)
    after = field_sets.elements_of(config, schema)
    result: list[Any] = []
    order, at = list(before), 0

    def keep_others(until: int) -> int:
        result.extend(before[element] for element in order[at:until] if element not in after)
        return max(at, until)

    for element, child in after.items():
        following = next((i for i in range(at, len(order)) if order[i] in after), len(order))
        at = keep_others(following)
        if element in before:
            at = keep_others(order.index(element) + 1)
            result.append(merge(before[element], child, schema.items or ANY))
        else:
            result.append(copy.deepcopy(child))
    keep_others(len(order))
    return result


def remove(value: Any, schema: Schema, paths: FieldSet) -> Any:
    """The value without the fields at `paths`; containers that become empty by it go too (None)."""
    return _removed(value, schema, _tree(paths))


def _tree(paths: FieldSet) -> Object:
    tree: Object = {}
    for path in paths:
        node = tree
        for element in path:
            node = node.setdefault(element, {})
        node["."] = True
    return tree


def _removed(value: Any, schema: Schema, tree: Object) -> Any:
    if field_sets.atomic(value, schema):
        return value
    if isinstance(value, dict):
        kept = {}
        for name, child in value.items():
            below = tree.get("f:" + name)
            if below is None:
                kept[name] = child
            elif "." not in below:
                left = _removed(child, schema.member(name) or ANY, below)
                if left is not None:
                    kept[name] = left
        return kept or None
    elements = []
    for element, child in field_sets.elements_of(value, schema).items():
        below = tree.get(element)
        if below is None:
            elements.append(child)
        elif "." not in below:
            left = _removed(child, schema.items or ANY, below)
            if left is not None:
                elements.append(left)
    return elements or None


def _prune(merged: Object, schema: Schema, owners: Owners, before: FieldSet) -> Object:
    """`merged` without what the applier gave `before` and nobody owns any more.

    First everything the applier had goes; then what any manager owns comes back; then what the
    applier never had (defaults, say) comes back, unless a field that holds it is gone.
    """
    with_parents = field_sets.with_named_parents
    had = with_parents(before)
    everything = with_parents(field_sets.fields_of(merged, schema))
    owned: set[Path] = set()
    for paths in owners.values():
        owned |= paths
    stripped = remove(merged, schema, had) or {}
    left = with_parents(field_sets.fields_of(stripped, schema)) | with_parents(owned)
    owned_only = remove(merged, schema, everything - left) or {}
    gone = everything - with_parents(field_sets.fields_of(owned_only, schema))
    result: Object = remove(merged, schema, gone & had) or {}
    return result
