"""Cron schedules: when the next time of one is. Pure.

The grammar is Kubernetes' (five fields, names, ranges, steps, `@hourly` and its kind, `@every`); times are of a
time zone, and those that a change of its clocks leaves out are left out.
"""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

_MONTHS = {calendar.month_abbr[n].lower(): n for n in range(1, 13)}
_DAYS = {calendar.day_abbr[(n - 1) % 7].lower(): n for n in range(7)}
_MACROS = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}  # fmt: skip
_UNITS = {"h": 3600, "m": 60, "s": 1}
_FARTHEST = 5
"""Years that a search looks ahead."""


class CronError(ValueError):
    """The text is not a schedule; the message names the field."""


def _field(text: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step_text = part.partition("/")
        if slash and (not step_text.isdigit() or int(step_text) == 0):
            raise CronError(f"{text!r} has a step that is not a positive number")
        step = int(step_text) if slash else 1

        def number(word: str) -> int:
            value = names.get(word.lower())
            if value is None:
                if not word.isdigit():
                    raise CronError(f"failed to parse int from {word}")
                value = int(word)
            if high == 6 and value == 7:
                value = 0
            if not low <= value <= high:
                raise CronError(f"{text!r} is outside of {low}-{high}")
            return value

        if span in ("*", "?"):
            first, last = low, high
        elif "-" in span:
            begin, end = span.split("-", 1)
            first = number(begin)
            last = 6 if high == 6 and end == "7" else number(end)
            if first > last:
                raise CronError(f"beginning of range ({first}) beyond end of range ({last}): {span}")
            if high == 6 and end == "7":
                found.add(0)
        else:
            first = number(span)
            last = high if slash else first
        found.update(range(first, last + 1, step))
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A parsed schedule; `every` is the interval of `@every`, else the sets of its fields count."""

    minutes: frozenset[int] = frozenset()
    hours: frozenset[int] = frozenset()
    days: frozenset[int] = frozenset()
    months: frozenset[int] = frozenset()
    weekdays: frozenset[int] = frozenset()
    any_day: bool = False
    """Whether day of month or of week is `*`: then both must match, else one of them."""
    every: timedelta | None = None

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a schedule. Raises CronError."""
        text = text.strip()
        if text.startswith("@every "):
            parts = re.findall(r"([0-9]+)([hms])", text[7:])
            seconds = sum(int(n) * _UNITS[unit] for n, unit in parts)
            if not seconds or "".join(n + u for n, u in parts) != text[7:].strip():
                raise CronError(f"failed to parse duration {text}")
            return cls(every=timedelta(seconds=seconds))
        fields = _MACROS.get(text, text).split()
        if len(fields) != 5:
            raise CronError(f"expected exactly 5 fields, found {len(fields)}: [{text}]")
        return cls(
            _field(fields[0], 0, 59, {}),
            _field(fields[1], 0, 23, {}),
            _field(fields[2], 1, 31, {}),
            _field(fields[3], 1, 12, _MONTHS),
            _field(fields[4], 0, 6, _DAYS),
            any(fields[n].startswith(("*", "?")) for n in (2, 4)),
        )

    def _matches_day(self, day: datetime) -> bool:
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return (of_month and of_week) if self.any_day else (of_month or of_week)

    def after(self, moment: datetime, zone: tzinfo) -> datetime | None:
        """The first time after a moment, in UTC; None when there is none for years."""
        if self.every is not None:
            return (moment + self.every).astimezone(UTC).replace(microsecond=0)
        local = moment.astimezone(zone).replace(second=0, microsecond=0, tzinfo=None) + timedelta(minutes=1)
        end = local.replace(year=local.year + _FARTHEST, day=min(local.day, 28))
        while local < end:
            if local.month not in self.months:
                local = (local.replace(day=1) + timedelta(days=32)).replace(day=1, hour=0, minute=0)
            elif not self._matches_day(local):
                local = (local + timedelta(days=1)).replace(hour=0, minute=0)
            elif local.hour not in self.hours:
                local = (local + timedelta(hours=1)).replace(minute=0)
            elif local.minute not in self.minutes:
                local += timedelta(minutes=1)
            else:
                there = local.replace(tzinfo=zone).astimezone(UTC)
                if there > moment and there.astimezone(zone).replace(tzinfo=None) == local:
                    return there
                local += timedelta(minutes=1)
        return None
