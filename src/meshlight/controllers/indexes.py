"""Sets of completion indexes as Jobs write them (`0-2,5`). Pure."""

from __future__ import annotations

from collections.abc import Iterable


def parse(text: str) -> set[int]:
    """Read a set; what is no index is left out."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if first.isdigit() and (not dash or last.isdigit()):
            found.update(range(int(first), int(last if dash else first) + 1))
    return found


def text(indexes: Iterable[int]) -> str:
    """Write a set, in order, with ranges of three and more (and of two, as Kubernetes has it, as a list)."""
    parts: list[tuple[int, int]] = []
    for index in sorted(indexes):
        if parts and index == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], index)
        else:
            parts.append((index, index))
    shown = []
    for first, last in parts:
        if first == last:
            shown.append(str(first))
        elif last == first + 1:
            shown.append(f"{first},{last}")
        else:
            shown.append(f"{first}-{last}")
    return ",".join(shown)
