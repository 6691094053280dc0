"""Cron schedules and what of them is due."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from meshlight.controllers.cron import CronError, Schedule
from meshlight.controllers.cronjob import due, job_of, surplus

START = datetime(2026, 3, 1, 10, 30, tzinfo=UTC)  # a Sunday


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("* * * * *", "2026-03-01T10:31"),
        ("*/15 * * * *", "2026-03-01T10:45"),
        ("5 4 * * *", "2026-03-02T04:05"),
        ("0 0 29 2 *", "2028-02-29T00:00"),
        ("0 12 * * mon-fri", "2026-03-02T12:00"),
        ("0 12 * * 7", "2026-03-01T12:00"),
        ("0 0 13 * 5", "2026-03-06T00:00"),
        ("0 0 1 jan,jul *", "2026-07-01T00:00"),
        ("10-20/5 11 * * *", "2026-03-01T11:10"),
        ("@hourly", "2026-03-01T11:00"),
        ("@every 1h30m", "2026-03-01T12:00"),
    ],
)
def test_next_time(text: str, expected: str) -> None:
    found = Schedule.parse(text).after(START, UTC)
    assert found is not None and found.isoformat() == f"{expected}:00+00:00"


@pytest.mark.parametrize(
    "text", ["", "* * * *", "60 * * * *", "* * 0 * *", "a * * * *", "*/0 * * * *", "@every x"]
)
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(CronError):
        Schedule.parse(text)


def test_times_are_of_a_zone_and_a_skipped_hour_is_skipped() -> None:
    zone = ZoneInfo("Europe/Berlin")
    found = Schedule.parse("30 2 * * *").after(datetime(2026, 3, 28, 12, tzinfo=UTC), zone)
    assert found == datetime(2026, 3, 30, 0, 30, tzinfo=UTC)  # on the 29th there is no 02:30


def test_a_date_that_never_comes() -> None:
    assert Schedule.parse("0 0 31 2 *").after(START, UTC) is None


def test_what_is_due() -> None:
    schedule = Schedule.parse("*/10 * * * *")
    found = due(schedule, UTC, START, datetime(2026, 3, 1, 11, 5, tzinfo=UTC))
    assert found.latest == datetime(2026, 3, 1, 11, 0, tzinfo=UTC) and found.missed == 3
    assert found.next == datetime(2026, 3, 1, 11, 10, tzinfo=UTC)
    assert due(schedule, UTC, START, START).latest is None
    years = due(Schedule.parse("* * * * *"), UTC, datetime(2020, 1, 1, tzinfo=UTC), START)
    assert years.latest == START and years.missed > 100


def test_a_job_is_named_after_its_time() -> None:
    item = {
        "metadata": {"name": "c", "namespace": "x", "uid": "u"},
        "spec": {"jobTemplate": {"metadata": {"labels": {"a": "b"}}, "spec": {"template": {}}}},
    }
    made = job_of(item, START)
    assert made["metadata"]["name"] == f"c-{int(START.timestamp()) // 60}"
    assert made["metadata"]["ownerReferences"][0]["kind"] == "CronJob"


def test_history_is_bounded() -> None:
    def job(name: str, kind: str) -> dict[str, Any]:
        return {
            "metadata": {"name": name},
            "status": {"startTime": name, "conditions": [{"type": kind, "status": "True"}]},
        }

    jobs = [job(str(n), "Complete") for n in range(5)] + [job(f"f{n}", "Failed") for n in range(3)]
    gone = [j["metadata"]["name"] for j in surplus({"spec": {}}, jobs)]
    assert gone == ["0", "1", "f0", "f1"]
