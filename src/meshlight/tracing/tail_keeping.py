"""Keeping under a budget: which traces of older parts stay when there is no room for all.

A trace with an error stays whole; so does one among the slowest twentieth of its root operation; of
the rest a share stays, chosen by trace id, so that a trace's parts decide alike. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshlight.tracing.store.columns import Columns, concatenate
from meshlight.tracing.store.search import Recent, failures

SLOWEST = 0.95
"""Quantile of a root operation's durations above which a trace counts as slow."""


def thin(parts: Sequence[Columns], share: float) -> Columns:
    """The records that stay of some parts taken together."""
    columns = concatenate(parts).sorted()
    if not len(columns):
        return columns
    return columns.take(np.flatnonzero(kept(columns, share)))


def kept(columns: Columns, share: float) -> NDArray[Any]:
    """Which records stay; `columns` are sorted by trace."""
    new = np.ones(len(columns), bool)
    new[1:] = (columns.high[1:] != columns.high[:-1]) | (columns.low[1:] != columns.low[:-1])
    first = np.flatnonzero(new)
    trace_of = np.cumsum(new) - 1
    failed = np.logical_or.reduceat(failures(Recent(columns)), first)
    # The low half of a trace id is random by every maker's convention.
    sampled = columns.low[first] / np.float64(1 << 64) < share
    stays: NDArray[Any] = failed | sampled | _slow(columns, first, trace_of)
    rows: NDArray[Any] = stays[trace_of]
    return rows


def _slow(columns: Columns, first: NDArray[Any], trace_of: NDArray[Any]) -> NDArray[Any]:
    """Traces among the slowest of their root operation; the root is the longest span without a parent,
    or the first span where all have one."""
    slow = np.zeros(len(first), bool)
    roots = first.copy()
    without = np.flatnonzero(columns.parent == 0)
    roots[trace_of[without]] = without
    operation = columns.origin[roots].astype(np.int64) << 32 | columns.name[roots]
    duration = columns.duration[roots]
    order = np.argsort(operation, kind="stable")
    bounds = np.flatnonzero(np.diff(operation[order], prepend=operation[order[0]] - 1))
    for group in np.split(order, bounds[1:]):
        slow[group] = duration[group] > np.quantile(duration[group], SLOWEST)
    return slow
