"""Schemas of objects: one shape for built-in kinds and for CustomResourceDefinitions.

Everything that must know what a field is reads these nodes: decoding, pruning, defaults, validation,
strategic merge keys, server-side apply, OpenAPI documents. Knows nothing of stores or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from meshlight.kube.resources import Object

UNSET: Any = object()
"""The default of a field that has none (None is a value)."""

ATOMIC = "atomic"
_CONSTRAINTS = (
    "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "format",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """One of a schema's `x-kubernetes-validations`: a CEL expression and the words for its failure."""

    expression: str
    message: str = ""
    message_expression: str = ""
    reason: str = "FieldValueInvalid"
    field_path: str = ""
    optional_old_self: bool = False


@dataclass(slots=True, eq=False)
class Schema:
    """What one value may be.

    `type` is a JSON type, or "" for a value of any type; `format` refines it (`int-or-string`,
    `quantity`, `byte`, `date-time`, `int32` …). `name` is the Go type of a built-in kind's struct.
    `list_type` and `map_type` say how server-side apply merges; `merge_key` and `patch_strategy`
    how strategic merge patches do. `inline` marks a struct that Kubernetes' types hold by value: it
    is always present, so nobody owns it. `open` keeps undeclared fields.
    """

    type: str = ""
    format: str = ""
    name: str = ""
    description: str = ""
    properties: dict[str, Schema] = field(default_factory=dict)
    values: Schema | None = None
    items: Schema | None = None
    required: list[str] = field(default_factory=list)
    default: Any = UNSET
    enum: tuple[Any, ...] = ()
    list_type: str = ATOMIC
    list_keys: tuple[str, ...] = ()
    map_type: str = "granular"
    merge_key: str = ""
    patch_strategy: tuple[str, ...] = ()
    inline: bool = False
    open: bool = False
    nullable: bool = False
    embedded: bool = False
    constraints: Object = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    plain: bool | None = None
    """Whether CEL sees its values as they are; `rules` finds out."""
    _ruled: bool | None = None
    _plan: list[tuple[str, Schema]] | None = None
    _defaulted: bool | None = None

    def member(self, name: str) -> Schema | None:
        """The schema of the member `name`: a declared property, or what all values of a map are."""
        return self.properties.get(name) or self.values

    def default_plan(self) -> list[tuple[str, Schema]]:
        """The properties that have a default, or something below that has; computed once."""
        if self._plan is None:
            self._plan = []  # what a recursive type finds on its way round
            self._plan = [(n, s) for n, s in self.properties.items() if s.default is not UNSET or s.defaulted()]
        return self._plan

    def defaulted(self) -> bool:
        """Whether anything below has a default; computed once."""
        if self._defaulted is None:
            self._defaulted = False  # what a recursive type finds on its way round
            below = (self.values, self.items)
            self._defaulted = bool(self.default_plan()) or any(s is not None and s.defaulted() for s in below)
        return self._defaulted

    def below(self) -> Iterator[Schema]:
        """The schemas of what is directly inside."""
        yield from self.properties.values()
        if self.values is not None:
            yield self.values
        if self.items is not None:
            yield self.items

    def ruled(self) -> bool:
        """Whether it or anything below has rules; computed once."""
        if self._ruled is None:
            self._ruled = False  # what a recursive type finds on its way round
            self._ruled = bool(self.rules) or any(s.ruled() for s in self.below())
        return self._ruled


ANY = Schema(open=True)
"""A value of which nothing is known: maps merge field by field, lists are atomic."""


def from_openapi(json_schema: Object, metadata: Schema) -> Schema:
    """The schema of a custom resource, from its version's `openAPIV3Schema`.

    `metadata` is ObjectMeta's schema, which every resource has whatever its own schema says.
    """
    root = replace(_node(json_schema), type="object")
    text = Schema(type="string")
    root.properties = {**root.properties, "apiVersion": text, "kind": text, "metadata": metadata}
    return root


def from_node(json_schema: Object) -> Schema:
    """The schema of one value, from a part of an `openAPIV3Schema`."""
    return _node(json_schema)


def _rule(source: Object) -> Rule:
    return Rule(
        source["rule"],
        source.get("message") or "",
        source.get("messageExpression") or "",
        source.get("reason") or "FieldValueInvalid",
        source.get("fieldPath") or "",
        bool(source.get("optionalOldSelf")),
    )


def _node(source: Object) -> Schema:
    """One node of an OpenAPI v3 schema."""
    if source.get("x-kubernetes-int-or-string"):
        node = Schema(format="int-or-string")
    else:
        node = Schema(type=source.get("type") or "", format=source.get("format") or "")
    node.description = source.get("description") or ""
    node.properties = {name: _node(child) for name, child in (source.get("properties") or {}).items()}
    extra = source.get("additionalProperties")
    if isinstance(extra, dict):
        node.values = _node(extra)
    if isinstance(source.get("items"), dict):
        node.items = _node(source["items"])
    node.required = list(source.get("required") or ())
    node.default = source.get("default", UNSET)
    node.enum = tuple(source.get("enum") or ())
    node.list_type = source.get("x-kubernetes-list-type") or ATOMIC
    node.list_keys = tuple(source.get("x-kubernetes-list-map-keys") or ())
    node.map_type = source.get("x-kubernetes-map-type") or "granular"
    node.nullable = bool(source.get("nullable"))
    node.embedded = bool(source.get("x-kubernetes-embedded-resource"))
    untyped = not node.type and not node.properties and not node.format
    node.open = bool(source.get("x-kubernetes-preserve-unknown-fields") or extra is True or untyped)
    node.constraints = {k: source[k] for k in _CONSTRAINTS if k in source}
    node.rules = tuple(_rule(rule) for rule in source.get("x-kubernetes-validations") or ())
    for word in ("allOf", "anyOf", "oneOf"):
        if word in source:
            node.constraints[word] = [_node(branch) for branch in source[word]]
    if "not" in source:
        node.constraints["not"] = _node(source["not"])
    return node
