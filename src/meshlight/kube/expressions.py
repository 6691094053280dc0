"""CEL expressions as the API uses them: compiled once, evaluated within bounds.

The evaluator ends an expression after 10,000 iterations; regular expressions are RE2's. The library is loaded
with the first expression. Functions of Kubernetes' own are `expression_library`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_EXPRESSION = 5 * 1024
"""Bytes of one expression."""
CACHED = 4_096
"""Compiled expressions that are kept."""


class ExpressionError(Exception):
    """An expression does not compile, or its evaluation fails; the message is the evaluator's."""


class BudgetError(ExpressionError):
    """The evaluation would take too long."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression."""

    source: str
    _compiled: Any

    def evaluate(self, variables: Mapping[str, Any]) -> Any:
        """Its value as plain Python. Raises ExpressionError."""
        try:
            value = self._compiled.eval(data=variables)
        except RuntimeError as error:
            text = str(error)
            if "budget exceeded" in text:
                raise BudgetError("expression exceeded its cost budget") from error
            raise ExpressionError(text) from error
        if value.type().name() == "*error*" or value.type() == _error_type():
            raise ExpressionError(_without_code(str(value.value())))
        return value.plain_value()


@functools.cache
def _error_type() -> Any:
    from cel_expr_python import cel

    return cel.Type.ERROR


def _without_code(text: str) -> str:
    """`NOT_FOUND: Key not found in map : "a"` in Kubernetes' words: `no such key: a`."""
    code, _, message = text.partition(": ")
    if code == "NOT_FOUND" and message.startswith("Key not found"):
        return f"no such key: {message.partition(' : ')[2].strip(chr(34))}"
    return message or text


@functools.cache
def _environment(variables: tuple[str, ...]) -> Any:
    from cel_expr_python import cel
    from cel_expr_python.ext import ext_bindings, ext_encoders, ext_math, ext_optional, ext_strings

    from meshlight.kube.expression_library import functions

    extensions = [
        ext_strings.ExtStrings(),
        ext_optional.ExtOptional(),
        ext_math.ExtMath(),
        ext_bindings.ExtBindings(),
        ext_encoders.ExtEncoders(),
        cel.CelExtension("kubernetes", functions()),
    ]
    types = {name: cel.Type.DYN for name in variables}
    return cel.NewEnv(variables=types, extensions=extensions)


@functools.lru_cache(maxsize=CACHED)
def compiled(source: str, *variables: str) -> Expression:
    """An expression over these variables. Raises ExpressionError."""
    if len(source.encode()) > MAX_EXPRESSION:
        raise ExpressionError(f"the expression is longer than {MAX_EXPRESSION} bytes")
    try:
        return Expression(source, _environment(variables).compile(source))
    except RuntimeError as error:
        first = str(error).removeprefix("INVALID_ARGUMENT: ").split("\n | ")[0]
        raise ExpressionError(first) from error
