"""Numbers over time of the records of services: how many, how many failed, how long they took.

Durations are counted in logarithmic classes (16 a doubling, 4 % wide), so that counts of parts add up
and a quantile needs no sorting. Pure over sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshlight.tracing.rows import resource_of
from meshlight.tracing.store.search import Source, failures

CLASSES = 640
PER_DOUBLING = 16


@dataclass(slots=True)
class Bucket:
    """The records of one window."""

    calls: int
    errors: int
    classes: NDArray[Any]

    def quantile(self, q: float) -> float | None:
        """Ns, the middle of the class in which the quantile lies; None without records."""
        if not self.calls:
            return None
        rank = np.searchsorted(np.cumsum(self.classes), q * self.calls, side="left")
        return float(2 ** ((min(int(rank), CLASSES - 1) + 0.5) / PER_DOUBLING))


def series(
    sources: Sequence[Source],
    services: Sequence[str],
    kinds: Sequence[int],
    by_operation: bool,
    points: Sequence[int],
    window: int,
) -> dict[tuple[str, str], list[Bucket]]:
    """For each (service, operation or empty) a bucket a point: the records that start in the `window` ns
    before it."""
    step = points[1] - points[0] if len(points) > 1 else window
    wide = max(1, -(-window // step))
    first = points[0] - wide * step
    slots = len(points) + wide
    sums: dict[tuple[str, str], tuple[NDArray[Any], NDArray[Any]]] = {}
    for source in sources:
        if not source.records or source.latest < first or source.earliest > points[-1]:
            continue
        of = [resource_of(o.resource).service for o in source.origins]
        if not any(service in services for service in of):
            continue
        wanted = np.array([service in services for service in of], bool)[source.column("origin")]
        wanted &= np.array([form.kind in kinds for form in source.forms], bool)[source.column("form")]
        start = source.column("start")
        wanted &= (start >= first) & (start < points[-1])
        rows = np.flatnonzero(wanted)
        if not len(rows):
            continue
        slot = ((start[rows] - first) // step).astype(np.int64)
        duration = np.maximum(source.column("duration")[rows], 1).astype(np.float64)
        level = np.minimum((np.log2(duration) * PER_DOUBLING).astype(np.int64), CLASSES - 1)
        failed = failures(source)[rows]
        origin, name = (
            source.column("origin")[rows].astype(np.int64),
            source.column("name")[rows].astype(np.int64),
        )
        key = (origin << 32 | name) if by_operation else origin << 32
        for k in np.unique(key).tolist():
            chosen = key == k
            label = of[k >> 32], source.names[k & 0xFFFFFFFF].decode("utf-8", "replace") if by_operation else ""
            counts, errors = sums.setdefault(
                label, (np.zeros((slots, CLASSES), np.int64), np.zeros(slots, np.int64))
            )
            np.add.at(counts, (slot[chosen], level[chosen]), 1)
            errors += np.bincount(slot[chosen], failed[chosen], slots).astype(np.int64)
    return {label: _windows(*found, len(points), wide) for label, found in sums.items()}


def _windows(counts: NDArray[Any], errors: NDArray[Any], points: int, wide: int) -> list[Bucket]:
    total = np.concatenate((np.zeros((1, CLASSES), np.int64), np.cumsum(counts, axis=0)))
    failed = np.concatenate(([0], np.cumsum(errors)))
    buckets = []
    for i in range(points):
        classes = total[i + wide] - total[i]
        buckets.append(Bucket(int(classes.sum()), int(failed[i + wide] - failed[i]), classes))
    return buckets
