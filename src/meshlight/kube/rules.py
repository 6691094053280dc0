"""CEL rules of custom resources (`x-kubernetes-validations`): evaluated value by value, old beside new.

A rule that names `oldSelf` is one of transition: it is evaluated where the old value is known, which for
lists needs keys. Bounded: by the evaluator for one expression, and in number and time for an object.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from meshlight.kube import expressions
from meshlight.kube.expressions import BudgetError, ExpressionError
from meshlight.kube.resources import Object
from meshlight.kube.schema import ANY, Rule, Schema
from meshlight.kube.status import Cause

MAX_EVALUATIONS = 20_000
MAX_SECONDS = 1.0
"""What all rules of one object may take."""

_OLD = re.compile(r"\boldSelf\b")
_IDENTIFIER = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_RESERVED = frozenset(
    ("true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if",
     "import", "let", "loop", "package", "namespace", "return", "var", "void", "while")
)  # fmt: skip
_ESCAPES = (("__", "__underscores__"), (".", "__dot__"), ("-", "__dash__"), ("/", "__slash__"))
_NOTHING: Any = object()
"""There is no old value, or none that can be told to be this value's."""

VARIABLES = ("self", "oldSelf")


@dataclass(slots=True)
class _Run:
    """The evaluation of one object's rules."""

    left: int
    until: float
    causes: list[Cause] = field(default_factory=list)


def transitional(rule: Rule) -> bool:
    """Whether a rule compares with the value before."""
    return _OLD.search(rule.expression) is not None


def wrapped(rule: Rule) -> str:
    """The expression that is compiled; with `optionalOldSelf` the old value becomes an optional one."""
    if not rule.optional_old_self:
        return rule.expression
    old = "oldSelf.size() > 0 ? optional.of(oldSelf[0]) : optional.none()"
    return f"cel.bind(__old, {old}, {_OLD.sub('__old', rule.expression)})"


def evaluate(obj: Object, schema: Schema, old: Object | None) -> list[Cause]:
    """Faults of an object by its schema's rules; `old` is the object that it replaces."""
    if not schema.ruled():
        return []
    run = _Run(MAX_EVALUATIONS, time.monotonic() + MAX_SECONDS)
    try:
        _walk(run, obj, _NOTHING if old is None else old, schema, "")
    except BudgetError:
        message = "validation failed due to running out of cost budget, no further validation rules will be run"
        run.causes.append(Cause("", "FieldValueInvalid", f'Invalid value: "{schema.type}": {message}'))
    return run.causes


def _walk(run: _Run, value: Any, old: Any, schema: Schema, path: str) -> None:
    if value is None:
        return
    if schema.rules:
        _apply(run, value, old, schema, path)
    for step, child, before, below in _inside(value, old, schema):
        if below.ruled():
            _walk(run, child, before, below, path + step if path else step.removeprefix("."))


def _inside(value: Any, old: Any, schema: Schema) -> Iterator[tuple[str, Any, Any, Schema]]:
    """What is directly inside a value: the step to it, itself, what it was, its schema."""
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for name, child in value.items():
            below = schema.properties.get(name)
            if below is not None:
                yield f".{name}", child, before.get(name, _NOTHING), below
            elif schema.values is not None:
                yield f"[{name}]", child, before.get(name, _NOTHING), schema.values
    elif isinstance(value, list) and schema.items is not None:
        keyed: dict[tuple[Any, ...], Any] = {}
        if schema.list_type == "map" and isinstance(old, list):
            keyed = {_key(element, schema): element for element in old}
        for index, child in enumerate(value):
            yield (
                f"[{index}]",
                child,
                keyed.get(_key(child, schema), _NOTHING) if keyed else _NOTHING,
                schema.items,
            )


def _key(element: Any, schema: Schema) -> tuple[Any, ...]:
    return tuple(element.get(k) for k in schema.list_keys) if isinstance(element, dict) else (str(element),)


def _apply(run: _Run, value: Any, old: Any, schema: Schema, path: str) -> None:
    variables: dict[str, Any] = {"self": converted(value, schema)}
    was = None if old is _NOTHING or old is None else converted(old, schema)
    for rule in schema.rules:
        if rule.optional_old_self:
            variables["oldSelf"] = [] if was is None else [was]
        elif transitional(rule) and was is None:
            continue
        else:
            variables["oldSelf"] = was
        run.left -= 1
        if run.left < 0 or time.monotonic() > run.until:
            raise BudgetError("too many evaluations")
        try:
            if expressions.compiled(wrapped(rule), *VARIABLES).evaluate(variables) is True:
                continue
            message = _message(rule, variables)
        except BudgetError:
            raise
        except ExpressionError as error:
            message = f"rule evaluation error: {error}"
        run.causes.append(_cause(rule, schema, path, message))


def _message(rule: Rule, variables: dict[str, Any]) -> str:
    if rule.message_expression:
        try:
            found = expressions.compiled(rule.message_expression, *VARIABLES).evaluate(variables)
        except ExpressionError:
            found = None
        if isinstance(found, str) and found.strip():
            return found.strip()
    return rule.message or f"failed rule: {' '.join(rule.expression.split())}"


def _cause(rule: Rule, schema: Schema, path: str, message: str) -> Cause:
    where = (path + rule.field_path).lstrip(".")
    shown = schema.type or "any"
    match rule.reason:
        case "FieldValueRequired":
            return Cause(where, rule.reason, f"Required value: {message}")
        case "FieldValueForbidden":
            return Cause(where, rule.reason, f"Forbidden: {message}")
        case "FieldValueDuplicate":
            return Cause(where, rule.reason, f'Duplicate value: "{shown}": {message}')
    return Cause(where, "FieldValueInvalid", f'Invalid value: "{shown}": {message}')


def escaped(name: str) -> str:
    """A property's name as an identifier of CEL, by Kubernetes' rules."""
    if name in _RESERVED:
        return f"__{name}__"
    for text, instead in _ESCAPES:
        name = name.replace(text, instead)
    return name


def _plain(schema: Schema) -> bool:
    """Whether values of the schema are what CEL shall see as they are."""
    if schema.format == "byte" or schema.type == "number":
        return False
    if any(escaped(name) != name for name in schema.properties):
        return False
    return all(_is_plain(below) for below in schema.below())


def _is_plain(schema: Schema) -> bool:
    if schema.plain is None:
        schema.plain = True  # what a recursive type finds on its way round
        schema.plain = _plain(schema)
    return schema.plain


def converted(value: Any, schema: Schema) -> Any:
    """The value as CEL sees it: numbers are doubles, names of properties identifiers."""
    if _is_plain(schema):
        return value
    if isinstance(value, dict):
        found = {}
        for name, child in value.items():
            below = schema.properties.get(name)
            if below is not None:
                found[escaped(name)] = converted(child, below)
            else:
                found[name] = converted(child, schema.values or ANY)
        return found
    if isinstance(value, list):
        items = schema.items or ANY
        return [converted(element, items) for element in value]
    if schema.type == "number" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
