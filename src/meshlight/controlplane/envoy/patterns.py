"""Regular expressions of users: refused here if Envoy's engine (RE2) would refuse them.

Python's engine is not RE2: a pattern must be one that both read alike, hence the list of what RE2 lacks.
"""

from __future__ import annotations

import functools
import re

LONGEST = 1024
NEVER = r"[^\s\S]"
"""Matches nothing."""
_NOT_RE2 = re.compile(r"\\[1-9]|\(\?(?:=|!|<=|<!|>|\(|#|P=)|\\[ZG]|[+*?}]\+|\\u")


@functools.lru_cache(maxsize=4096)
def fault(pattern: str) -> str | None:
    """What is wrong with a pattern; None when nothing is."""
    if len(pattern) > LONGEST:
        return f"longer than {LONGEST} characters"
    unclassed = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", lambda m: m[0] if m[0][0] == "\\" else "x", pattern)
    if found := _NOT_RE2.search(unclassed):
        return f"{found[0]!r} is not of RE2's syntax"
    if any(int(n) > 1000 for n in re.findall(r"\{(?:\d+,)?(\d+)\}", unclassed)):
        return "repeats more than 1000 times"
    text = re.sub(r"\\[pP](?:\{\^?\w+\}|\w)", "x", pattern).replace(r"\z", r"\Z").replace(r"\C", ".")
    text = re.sub(r"\[\[:\^?\w+:\]\]", "x", text).replace("(?U)", "")
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None
