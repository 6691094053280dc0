"""Sets of fields, as `managedFields` has them, and what two objects differ in.

A path is a tuple of `fieldsV1` elements: `f:name` a field, `k:{"name":"a"}` an element of a list by its
keys, `v:"x"` an element of a set, `i:0` one by index. A field set is a frozenset of paths; lists and maps
are members beside what they hold. Follows the field sets of structured-merge-diff.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson

from meshlight.kube.resources import Object
from meshlight.kube.schema import ANY, UNSET, Schema

Path = tuple[str, ...]
FieldSet = frozenset[Path]
EMPTY: FieldSet = frozenset()


class KeyMissingError(ValueError):
    """An element of a keyed list lacks its key, or two have the same one."""


class Difference(NamedTuple):
    """What changed between two objects."""

    added: FieldSet
    removed: FieldSet
    modified: FieldSet

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.modified)


def from_json(tree: Object) -> FieldSet:
    """A field set from `fieldsV1`."""
    paths: set[Path] = set()

    def walk(node: Object, at: Path) -> None:
        for element, below in node.items():
            if element == ".":
                paths.add(at)
            elif below:
                walk(below, (*at, element))
            else:
                paths.add((*at, element))

    walk(tree, ())
    return frozenset(paths)


def to_json(paths: FieldSet) -> Object:
    """A field set as `fieldsV1`."""
    tree: Object = {}
    for path in sorted(paths):  # a member comes before what it holds
        node = tree
        for depth, element in enumerate(path):
            below = node.get(element)
            if below is None:
                if not node and depth and path[:depth] in paths:
                    node["."] = {}
                below = node[element] = {}
            node = below
    return tree


def shown(path: Path) -> str:
    """A path as messages have it: `.spec.containers[name="a"].image`."""
    text = ""
    for element in path:
        kind, value = element[:2], element[2:]
        if kind == "f:":
            text += f".{value}"
        elif kind == "k:":
            keys = orjson.loads(value)
            listed = ",".join(f"{k}={orjson.dumps(v).decode()}" for k, v in sorted(keys.items()))
            text += f"[{listed}]"
        elif kind == "v:":
            text += f"[={value}]"
        else:
            text += f"[{value}]"
    return text


def element_of(value: Any, schema: Schema) -> str:
    """The path element of a list's element. Raises KeyMissingError."""
    if schema.list_type == "set":
        return "v:" + orjson.dumps(value).decode()
    if not isinstance(value, dict):
        raise KeyMissingError("element of a keyed list is not an object")
    keys = {}
    items = schema.items or ANY
    for name in schema.list_keys:
        key = value.get(name)
        if key is None:
            declared = items.properties.get(name)
            key = declared.default if declared is not None else UNSET
            if key is UNSET:
                continue
        keys[name] = key
    if not keys:
        listed = ", ".join(schema.list_keys)
        raise KeyMissingError(f"associative list with keys has an element that omits key field {listed!r}")
    return "k:" + orjson.dumps(keys, option=orjson.OPT_SORT_KEYS).decode()


def elements_of(values: list[Any], schema: Schema) -> dict[str, Any]:
    """A keyed list or set by path element, in its order. Raises KeyMissingError on a duplicate."""
    found: dict[str, Any] = {}
    for value in values:
        element = element_of(value, schema)
        if element in found:
            raise KeyMissingError(f"duplicate entries for key {shown((element,))}")
        found[element] = value
    return found


def atomic(value: Any, schema: Schema) -> bool:
    """Whether the value is one field, whatever it holds."""
    if isinstance(value, dict):
        return schema.map_type == "atomic"
    if isinstance(value, list):
        return schema.list_type == "atomic"
    return True


def fields_of(value: Any, schema: Schema) -> FieldSet:
    """Every field that an applied configuration gives an opinion on. Raises KeyMissingError."""
    paths: set[Path] = set()
    _collect(value, schema, (), paths)
    return frozenset(paths)


def _collect(value: Any, schema: Schema, at: Path, paths: set[Path]) -> None:
    if atomic(value, schema):
        paths.add(at)
    elif isinstance(value, dict):
        for name, child in value.items():
            below = schema.properties.get(name)
            path = (*at, "f:" + name)
            _collect(child, below or schema.values or ANY, path, paths)
            if child is None or child == {} or below is None:
                paths.add(path)
    else:
        for element, child in elements_of(value, schema).items():
            path = (*at, element)
            _collect(child, schema.items or ANY, path, paths)
            paths.add(path)


def difference(old: Any, new: Any, schema: Schema) -> Difference:
    """The fields in which `new` differs from `old`; lists and maps that appear are added with all they hold."""
    added: set[Path] = set()
    removed: set[Path] = set()
    modified: set[Path] = set()
    _compare(old, new, schema, (), added, removed, modified)
    return Difference(frozenset(added), frozenset(removed), frozenset(modified))


def _compare(
    old: Any,
    new: Any,
    schema: Schema,
    at: Path,
    added: set[Path],
    removed: set[Path],
    modified: set[Path],
) -> None:
    if old == new and type(old) is type(new):
        return
    if type(old) is not type(new) or atomic(new, schema):
        modified.add(at)
        return
    if isinstance(new, dict):
        for name, child in new.items():
            below = schema.properties.get(name) or schema.values or ANY
            if name in old:
                _compare(old[name], child, below, (*at, "f:" + name), added, removed, modified)
            else:
                _everything(child, below, (*at, "f:" + name), added)
        for name, child in old.items():
            if name not in new:
                below = schema.properties.get(name) or schema.values or ANY
                _everything(child, below, (*at, "f:" + name), removed)
        return
    try:
        before, after = elements_of(old, schema), elements_of(new, schema)
    except KeyMissingError:
        modified.add(at)
        return
    items = schema.items or ANY
    for element, child in after.items():
        if element in before:
            _compare(before[element], child, items, (*at, element), added, removed, modified)
        else:
            _everything(child, items, (*at, element), added)
    for element, child in before.items():
        if element not in after:
            _everything(child, items, (*at, element), removed)


def _everything(value: Any, schema: Schema, at: Path, paths: set[Path]) -> None:
    """All fields of a value that appeared or disappeared as a whole, itself included."""
    paths.add(at)
    if atomic(value, schema):
        return
    if isinstance(value, dict):
        for name, child in value.items():
            below = schema.properties.get(name) or schema.values or ANY
            _everything(child, below, (*at, "f:" + name), paths)
    else:
        try:
            elements = elements_of(value, schema)
        except KeyMissingError:
            return
        for element, child in elements.items():
            _everything(child, schema.items or ANY, (*at, element), paths)


def with_named_parents(paths: Iterable[Path]) -> FieldSet:
    """The set, and every field (not list element) on the way to its members."""
    found = set(paths)
    for path in tuple(found):
        for length in range(1, len(path)):
            if path[length - 1].startswith("f:"):
                found.add(path[:length])
    return frozenset(found)
