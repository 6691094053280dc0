"""Who an image's `User` is, by its own /etc/passwd and /etc/group. Pure.

Forms: `user`, `uid`, `user:group`, `uid:gid`; empty is root. A number need not be known.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Account:
    """A user's numbers and home."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def _lines(text: str, fields: int) -> list[list[str]]:
    split = (line.split(":") for line in text.splitlines())
    return [words for words in split if len(words) >= fields]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) <= MOST_ID else None


def user(asked: str, passwd: str, group: str) -> Account | None:
    """The account that is asked for; None when a name is not known."""
    name, colon, wanted = (asked or "0").partition(":")
    known = _lines(passwd, 6)
    number = _number(name)
    entry = next((e for e in known if (e[0] == name if number is None else e[2] == name)), None)
    if entry is None and number is None:
        return None
    uid = _number(entry[2]) if entry else number
    gid = (_number(entry[3]) or 0) if entry else 0
    home = entry[5] if entry and entry[5] else "/"
    groups = _lines(group, 4)
    if colon:
        found = _number(wanted)
        if found is None:
            found = next((_number(e[2]) for e in groups if e[0] == wanted), None)
        if found is None:
            return None
        gid = found
    mine = [_number(e[2]) for e in groups if entry and entry[0] in e[3].split(",")] if not colon else []
    return None if uid is None else Account(uid, gid, tuple(g for g in mine if g is not None), home)
