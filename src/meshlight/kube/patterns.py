"""Regular expressions of schemas and rules: RE2's, as Kubernetes means them, in linear time."""

from __future__ import annotations

import functools
from typing import Any

import re2


class PatternError(ValueError):
    """The text is no regular expression of RE2."""


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str) -> Any:
    """A compiled pattern, with Python's `search` and `finditer`. Raises PatternError."""
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise PatternError(f"{pattern!r} is not a regular expression: {error}") from error
