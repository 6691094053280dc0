"""Regular expressions of users: refused here if Envoy's engine (RE2) would refuse them. Pure."""

from __future__ import annotations

from meshlight.kube.patterns import PatternError, compiled

LONGEST = 1024
NEVER = r"[^\s\S]"
"""Matches nothing."""


def fault(pattern: str) -> str | None:
    """What is wrong with a pattern; None when nothing is."""
    if len(pattern) > LONGEST:
        return f"longer than {LONGEST} characters"
    try:
        compiled(pattern)
    except PatternError as error:
        return str(error)
    return None
