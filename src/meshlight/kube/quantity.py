"""Resource quantities: `500m`, `2Gi`, `1e3`, as Kubernetes parses and writes them.

Kubernetes stores every quantity in one canonical form (`0.5` becomes `500m`, `1024Mi` becomes `1Gi`),
so that equal amounts are equal strings.
"""

from __future__ import annotations

import functools
import re
from decimal import ROUND_UP, Context, Decimal, InvalidOperation

_FORM = re.compile(r"([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)")
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_EXPONENT = re.compile(r"[eE]([-+]?[0-9]+)")
_NANO = Decimal(1).scaleb(-9)
_EXACT = Context(prec=60, rounding=ROUND_UP)
"""Wider than any amount that makes sense; what does not fit is refused, not rounded."""


class QuantityError(ValueError):
    """The text is no quantity; the message is Kubernetes' own."""


@functools.lru_cache(maxsize=4096)
def value(text: str) -> Decimal:
    """The amount, in the resource's base unit (cores, bytes). Raises QuantityError."""
    return _parse(text)[0]


@functools.lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """The form in which Kubernetes stores this quantity. Raises QuantityError."""
    amount, family = _parse(text)
    if family == "binary" and amount == amount.to_integral_value() and abs(amount) >= 1024:
        whole = int(amount)
        suffix = ""
        for name, bits in _BINARY.items():
            if whole % (1 << bits):
                break
            suffix, shown = name, whole >> bits
        return f"{shown}{suffix}" if suffix else str(whole)
    if amount == 0:
        return "0"
    exponent = 18
    while exponent > -9 and _EXACT.remainder(amount, _EXACT.power(10, exponent)):
        exponent -= 3
    digits = str(int(_EXACT.scaleb(amount, -exponent)))
    if family == "exponent":
        return digits if exponent == 0 else f"{digits}e{exponent}"
    return digits + next(name for name, power in _DECIMAL.items() if power == exponent)


def _parse(text: str) -> tuple[Decimal, str]:
    """Amount, rounded up to nano, and how it was written: binary, decimal or exponent."""
    match = _FORM.fullmatch(text.strip())
    if match is None or match[1].count(".") > 1 or not any(c.isdigit() for c in match[1]):
        raise QuantityError(
            "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
        )
    number, suffix = Decimal(match[1]), match[2]
    try:
        if suffix in _DECIMAL:
            return _EXACT.quantize(_EXACT.scaleb(number, _DECIMAL[suffix]), _NANO), "decimal"
        if suffix in _BINARY:
            return _EXACT.quantize(_EXACT.multiply(number, Decimal(1 << _BINARY[suffix])), _NANO), "binary"
        if exponent := _EXPONENT.fullmatch(suffix):
            return _EXACT.quantize(_EXACT.scaleb(number, int(exponent[1])), _NANO), "exponent"
    except (InvalidOperation, OverflowError):
        raise QuantityError(f"the quantity {text[:40]} is out of range") from None
    raise QuantityError("unable to parse quantity's suffix")
