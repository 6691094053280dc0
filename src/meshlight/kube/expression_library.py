"""The functions that Kubernetes adds to CEL: lists, sets, regular expressions, URLs, addresses, quantities.

Values of Kubernetes' opaque types (URL, IP, CIDR, Quantity) are strings here, in canonical form.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any
from urllib.parse import SplitResult, parse_qs, quote, urlsplit

from cel_expr_python import cel

from meshlight.kube import patterns, quantity

_T = cel.Type
_LIST = _T.List(_T.DYN)
_SCALARS = {"int": _T.INT, "double": _T.DOUBLE, "string": _T.STRING, "bool": _T.BOOL}
_NAMES: dict[str, Any] = {
    **_SCALARS, "list": _LIST, "strings": _T.List(_T.STRING), "dyn": _T.DYN, "map": _T.Map(_T.STRING, _T.DYN),
    "timestamp": _T.TIMESTAMP, "duration": _T.DURATION,
}  # fmt: skip
MAX_FOUND = 1_000
"""Matches that `findAll` gives."""

_declared: dict[str, list[tuple[str, Callable[..., Any]]]] = {}


def _function(*signatures: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an implementation under signatures such as `list.indexOf(string) int` or `isIP(string) bool`."""

    def declare(implementation: Callable[..., Any]) -> Callable[..., Any]:
        for signature in signatures:
            head = signature.partition("(")[0]
            receiver, _, name = head.rpartition(".")
            name = name if receiver in _NAMES else head
            _declared.setdefault(name, []).append((signature, implementation))
        return implementation

    return declare


@functools.cache
def functions() -> list[Any]:
    """All declarations, for an environment."""
    return [
        cel.FunctionDecl(name, [_overload(name, signature, impl) for signature, impl in declared])
        for name, declared in _declared.items()
    ]


def _overload(name: str, signature: str, implementation: Callable[..., Any]) -> Any:
    head, _, rest = signature.partition("(")
    inside, _, result = rest.partition(")")
    parameters = [p.strip() for p in inside.split(",") if p.strip()]
    receiver = head[: -len(name) - 1] if head != name else ""
    types = [_NAMES[p] for p in ([receiver] if receiver else []) + parameters]
    return cel.Overload(
        f"k8s_{signature}",
        return_type=_NAMES[result.strip()],
        parameters=types,
        is_member=bool(receiver),
        impl=implementation,
    )


# Lists


@_function("list.isSorted() bool")
def _is_sorted(values: list[Any]) -> bool:
    return all(a <= b for a, b in itertools.pairwise(values))


@_function("list.sum() dyn")
def _sum(values: list[Any]) -> Any:
    return sum(values)


@_function("list.min() dyn")
def _min(values: list[Any]) -> Any:
    if not values:
        raise ValueError("min called on empty list")
    return min(values)


@_function("list.max() dyn")
def _max(values: list[Any]) -> Any:
    if not values:
        raise ValueError("max called on empty list")
    return max(values)


@_function(*(f"list.indexOf({kind}) int" for kind in (*_SCALARS, "map")))
def _index_of(values: list[Any], wanted: Any) -> int:
    return next((i for i, v in enumerate(values) if v == wanted), -1)


@_function(*(f"list.lastIndexOf({kind}) int" for kind in (*_SCALARS, "map")))
def _last_index_of(values: list[Any], wanted: Any) -> int:
    return next((i for i in range(len(values) - 1, -1, -1) if values[i] == wanted), -1)


@_function("list.distinct() list")
def _distinct(values: list[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


@_function("list.flatten() list")
def _flatten(values: list[Any]) -> list[Any]:
    return [e for v in values for e in (v if isinstance(v, list) else [v])]


@_function("list.reverse() list")
def _reverse(values: list[Any]) -> list[Any]:
    return values[::-1]


@_function("list.sort() list")
def _sort(values: list[Any]) -> list[Any]:
    return sorted(values)


@_function("list.slice(int, int) list")
def _slice(values: list[Any], start: int, end: int) -> list[Any]:
    if not 0 <= start <= end <= len(values):
        raise ValueError(f"cannot slice({start}, {end}), list has {len(values)} elements")
    return values[start:end]


# Sets


def _within(values: Iterable[Any], others: list[Any]) -> bool:
    return all(v in others for v in values)


@_function("sets.contains(list, list) bool")
def _sets_contains(values: list[Any], others: list[Any]) -> bool:
    return _within(others, values)


@_function("sets.equivalent(list, list) bool")
def _sets_equivalent(values: list[Any], others: list[Any]) -> bool:
    return _within(others, values) and _within(values, others)


@_function("sets.intersects(list, list) bool")
def _sets_intersects(values: list[Any], others: list[Any]) -> bool:
    return any(v in others for v in values)


# Regular expressions


@_function("string.find(string) string")
def _find(text: str, pattern: str) -> str:
    found = patterns.compiled(pattern).search(text)
    return found[0] if found else ""


@_function("string.findAll(string) strings")
def _find_all(text: str, pattern: str) -> list[str]:
    return [m[0] for m in itertools.islice(patterns.compiled(pattern).finditer(text), MAX_FOUND)]


@_function("string.findAll(string, int) strings")
def _find_some(text: str, pattern: str, limit: int) -> list[str]:
    found = _find_all(text, pattern)
    return [str(m) for m in (found if limit < 0 else found[:limit])]


# URLs


def _parsed(text: str) -> SplitResult:
    parts = urlsplit(text)
    if not parts.scheme and not text.startswith("/"):
        raise ValueError(
            f"URL parse error during conversion from string: parse {text!r}: invalid URI for request"
        )
    _ = parts.port  # raises ValueError when it is none
    return parts


@_function("url(string) string")
def _url(text: str) -> str:
    _parsed(text)
    return text


@_function("isURL(string) bool")
def _is_url(text: str) -> bool:
    try:
        _parsed(text)
    except ValueError:
        return False
    return True


@_function("string.getScheme() string")
def _scheme(text: str) -> str:
    return _parsed(text).scheme


@_function("string.getHost() string")
def _host(text: str) -> str:
    return _parsed(text).netloc.rpartition("@")[2]


@_function("string.getHostname() string")
def _hostname(text: str) -> str:
    return _parsed(text).hostname or ""


@_function("string.getPort() string")
def _port(text: str) -> str:
    port = _parsed(text).port
    return "" if port is None else str(port)


@_function("string.getEscapedPath() string")
def _path(text: str) -> str:
    return quote(_parsed(text).path, safe="/%:@!$&'()*+,;=~-._")


@_function("string.getQuery() map")
def _query(text: str) -> dict[str, list[str]]:
    return parse_qs(_parsed(text).query, keep_blank_values=True)


# Addresses


@_function("ip(string) string")
def _ip(text: str) -> str:
    return str(_address(text))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = ipaddress.ip_address(text)
    except ValueError as error:
        raise ValueError(f"IP Address {text!r} parse error during conversion from string") from error
    if "%" in text or (found.version == 6 and found.ipv4_mapped is not None):
        raise ValueError(f"IP Address {text!r} with a zone or mapped from IPv4 is not allowed")
    return found


@_function("isIP(string) bool")
def _is_ip(text: str) -> bool:
    try:
        _address(text)
    except ValueError:
        return False
    return True


@_function("ip.isCanonical(string) bool")
def _is_canonical(text: str) -> bool:
    return str(_address(text)) == text


@_function("string.family() int")
def _family(text: str) -> int:
    return _address(text).version


@_function("string.isLoopback() bool")
def _is_loopback(text: str) -> bool:
    return _address(text).is_loopback


@_function("string.isUnspecified() bool")
def _is_unspecified(text: str) -> bool:
    return _address(text).is_unspecified


@_function("string.isLinkLocalMulticast() bool")
def _is_link_local_multicast(text: str) -> bool:
    found = _address(text)
    network = "224.0.0.0/24" if found.version == 4 else "ff02::/16"
    return found in ipaddress.ip_network(network)


@_function("string.isLinkLocalUnicast() bool")
def _is_link_local_unicast(text: str) -> bool:
    return _address(text).is_link_local


@_function("string.isGlobalUnicast() bool")
def _is_global_unicast(text: str) -> bool:
    found = _address(text)
    return not (found.is_loopback or found.is_unspecified or found.is_multicast or found.is_link_local)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ValueError(f"network address parse error during conversion from string: {text}") from error


@_function("cidr(string) string")
def _cidr(text: str) -> str:
    if "/" not in text:
        raise ValueError(f"network address parse error during conversion from string: {text}")
    _network(text)
    return text


@_function("isCIDR(string) bool")
def _is_cidr(text: str) -> bool:
    try:
        _cidr(text)
    except ValueError:
        return False
    return True


@_function("string.containsIP(string) bool")
def _contains_ip(network: str, address: str) -> bool:
    return _address(address) in _network(network)


@_function("string.containsCIDR(string) bool")
def _contains_cidr(network: str, other: str) -> bool:
    outer, inner = _network(network), _network(other)
    return outer.version == inner.version and inner.subnet_of(outer)  # type: ignore[arg-type]


@_function("string.ip() string")
def _network_ip(network: str) -> str:
    return network.partition("/")[0]


@_function("string.masked() string")
def _masked(network: str) -> str:
    return str(_network(network))


@_function("string.prefixLength() int")
def _prefix_length(network: str) -> int:
    return _network(network).prefixlen


# Quantities


def _amount(text: str) -> Decimal:
    try:
        return quantity.value(text)
    except quantity.QuantityError as error:
        raise ValueError(str(error)) from error


@_function("quantity(string) string")
def _quantity(text: str) -> str:
    _amount(text)
    return quantity.canonical(text)


@_function("isQuantity(string) bool")
def _is_quantity(text: str) -> bool:
    try:
        _amount(text)
    except ValueError:
        return False
    return True


@_function("string.isGreaterThan(string) bool")
def _is_greater(one: str, other: str) -> bool:
    return _amount(one) > _amount(other)


@_function("string.isLessThan(string) bool")
def _is_less(one: str, other: str) -> bool:
    return _amount(one) < _amount(other)


@_function("string.compareTo(string) int")
def _compare(one: str, other: str) -> int:
    a, b = _amount(one), _amount(other)
    return (a > b) - (a < b)


@_function("string.sign() int")
def _sign(text: str) -> int:
    found = _amount(text)
    return (found > 0) - (found < 0)


@_function("string.isInteger() bool")
def _is_integer(text: str) -> bool:
    return _amount(text) == _amount(text).to_integral_value()


@_function("string.asInteger() int")
def _as_integer(text: str) -> int:
    if not _is_integer(text):
        raise ValueError("cannot convert value to integer")
    return int(_amount(text))


@_function("string.asApproximateFloat() double")
def _as_float(text: str) -> float:
    return float(_amount(text))


@_function("string.add(string) string")
def _add(one: str, other: str) -> str:
    return quantity.canonical(format(_amount(one) + _amount(other), "f"))


@_function("string.sub(string) string")
def _sub(one: str, other: str) -> str:
    return quantity.canonical(format(_amount(one) - _amount(other), "f"))
