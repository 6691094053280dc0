"""What Envoy would refuse, found before it is told: the constraints that its schemas carry. Pure.

Envoy's messages say in their own options (protoc-gen-validate's) what each field must be; Envoy checks them
when it is given a resource, and refuses it whole. Here the same rules are read from the same schemas. Patterns
are the parsers' to check (`patterns`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from validate import validate_pb2

Check = Callable[[Any], str | None]
_HEADER_NAME = re.compile(r":?[0-9a-zA-Z!#$%&'*+\-.^_|~`]+")
_BAD_IN_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda value, bound: value > bound,
    "gte": lambda value, bound: value >= bound,
    "lt": lambda value, bound: value < bound,
    "lte": lambda value, bound: value <= bound,
}
_NUMBERS = ("uint32", "uint64", "int32", "int64", "double", "float", "sint32", "fixed32")


def fault(message: Message) -> str | None:
    """The first thing wrong with a message, as `path.of.field: what`; None when nothing is."""
    return next(_faults(message, ""), None)


def _faults(message: Message, path: str) -> Iterator[str]:
    rules, oneofs = _rules_of(message.DESCRIPTOR)
    for name in oneofs:
        if message.WhichOneof(name) is None:
            yield f"{path}{name}: one of its alternatives is needed"
    for name, field_rules in rules:
        for check in field_rules:
            if (what := check(message)) is not None:
                yield f"{path}{name}: {what}"
    if message.DESCRIPTOR.full_name == "google.protobuf.Any":
        inner = _unpacked(message)
        if inner is not None:
            yield from _faults(inner, path)
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        where = f"{path}{field.name}."
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for entry in value.values():
                    yield from _faults(entry, where)
        elif isinstance(value, Message):
            yield from _faults(value, where)
        else:
            for entry in value:
                yield from _faults(entry, where)


def _unpacked(any_message: Any) -> Message | None:
    name = any_message.type_url.rpartition("/")[2]
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
    except KeyError:
        return None
    made: Message = message_factory.GetMessageClass(descriptor)()
    made.ParseFromString(any_message.value)
    return made


@functools.lru_cache(maxsize=2048)
def _rules_of(descriptor: Descriptor) -> tuple[tuple[tuple[str, tuple[Check, ...]], ...], tuple[str, ...]]:
    options = descriptor.GetOptions()
    if options.Extensions[validate_pb2.disabled] or options.Extensions[validate_pb2.ignored]:
        return (), ()
    rules = tuple((field.name, checks) for field in descriptor.fields if (checks := tuple(_checks(field))))
    oneofs = tuple(
        oneof.name for oneof in descriptor.oneofs if oneof.GetOptions().Extensions[validate_pb2.required]
    )
    return rules, oneofs


def _checks(field: FieldDescriptor) -> Iterator[Check]:
    if not field.GetOptions().HasExtension(validate_pb2.rules):
        return
    rules = field.GetOptions().Extensions[validate_pb2.rules]
    kind, name = rules.WhichOneof("type"), field.name
    chosen_alone = field.containing_oneof is not None  # then only its own presence could be asked for
    if not chosen_alone and (
        rules.message.required or (kind in ("duration", "timestamp", "any") and getattr(rules, kind).required)
    ):
        yield lambda message: None if message.HasField(name) else "is required"
    if kind == "repeated":
        yield from _repeated(name, rules.repeated)
    elif kind is not None and not getattr(field, "is_repeated", False):
        single = _single(kind, getattr(rules, kind), field)
        if single is not None:
            wrapped = field.message_type is not None and kind not in ("duration", "timestamp", "any", "message")
            yield functools.partial(_of_field, name, single, field, wrapped)


def _of_field(name: str, check: Check, field: FieldDescriptor, wrapped: bool, message: Any) -> str | None:
    if (field.has_presence and not message.HasField(name)) or (
        field.containing_oneof and not message.HasField(name)
    ):
        return None
    value = getattr(message, name)
    return check(value.value if wrapped else value)


def _repeated(name: str, rules: Any) -> Iterator[Check]:
    if rules.HasField("min_items"):
        least = rules.min_items
        yield lambda m: None if len(getattr(m, name)) >= least else f"at least {least} are needed"
    if rules.HasField("max_items"):
        most = rules.max_items
        yield lambda m: None if len(getattr(m, name)) <= most else f"at most {most} are allowed"
    if rules.HasField("items") and (kind := rules.items.WhichOneof("type")):
        each = _single(kind, getattr(rules.items, kind), None)
        if each is not None:
            found = each
            yield lambda m: next((what for entry in getattr(m, name) if (what := found(entry))), None)


def _single(kind: str, rules: Any, field: FieldDescriptor | None) -> Check | None:
    if kind in _NUMBERS:
        return functools.partial(_number, rules)
    if kind == "string":
        return functools.partial(_text, rules)
    if kind == "duration":
        return functools.partial(_duration, rules)
    if kind == "enum" and rules.defined_only and field is not None and field.enum_type is not None:
        known = set(field.enum_type.values_by_number)
        return lambda value: None if value in known else f"{value} is none of its values"
    return None


def _number(rules: Any, value: Any) -> str | None:
    for name, holds in _BOUNDS.items():
        if rules.HasField(name) and not holds(value, getattr(rules, name)):
            return f"{value} is not {name} {getattr(rules, name)}"
    return None


def _duration(rules: Any, value: Any) -> str | None:
    for name, holds in _BOUNDS.items():
        if rules.HasField(name) and not holds(value.ToNanoseconds(), getattr(rules, name).ToNanoseconds()):
            return f"{value.ToJsonString()} is not {name} {getattr(rules, name).ToJsonString()}"
    return None


def _text(rules: Any, value: str) -> str | None:
    if rules.ignore_empty and not value:
        return None
    size = len(value.encode())
    if (rules.HasField("min_len") and len(value) < rules.min_len) or (
        rules.HasField("min_bytes") and size < rules.min_bytes
    ):
        return "must not be empty"
    if (rules.HasField("max_len") and len(value) > rules.max_len) or (
        rules.HasField("max_bytes") and size > rules.max_bytes
    ):
        return f"is longer than {rules.max_len or rules.max_bytes}"
    if rules.HasField("prefix") and not value.startswith(rules.prefix):
        return f"{value!r} does not begin with {rules.prefix!r}"
    if rules.well_known_regex == validate_pb2.HTTP_HEADER_NAME and value:
        good = _HEADER_NAME.fullmatch(value) if rules.strict else not re.search(r"[\x00\n\r]", value)
        return None if good else f"{value!r} is no name of a header"
    if rules.well_known_regex == validate_pb2.HTTP_HEADER_VALUE:
        bad = _BAD_IN_HEADER if rules.strict else re.compile(r"[\x00\n\r]")
        return f"{value!r} is no value of a header" if bad.search(value) else None
    return None
