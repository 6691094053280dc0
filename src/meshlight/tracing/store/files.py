"""The folder of a collection: parts, log segments, and the manifest that says which of them count.

`manifest.json` is replaced atomically: the parts that are live, with when each was received, and the
log segment up to which they hold everything. A part that it does not name is a leftover of a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from meshlight.tracing.store.blocks import Damaged
from meshlight.tracing.store.log import sync_folder

SCHEMA = 2
MANIFEST = "manifest.json"


@dataclass(slots=True)
class Manifest:
    """`parts`: number → unix time (s) at which its newest record was received."""

    parts: dict[int, float] = field(default_factory=dict)
    logged_through: int = 0
    next_number: int = 1


def read(folder: Path) -> Manifest:
    """The manifest of a folder, migrated to this version's schema; an empty one for a new folder.

    Raises Damaged when it cannot be read or a newer version wrote it.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return Manifest()
    try:
        found = orjson.loads(content)
        schema = found["schema"]
        if schema > SCHEMA:
            raise Damaged(
                f"{folder / MANIFEST} is of schema {schema}, of a newer version (this one knows {SCHEMA})"
            )
        if schema < 2:
            # Schema 1 had a list of numbers without times: they count as received when their file was written.
            found["parts"] = [[n, _written(folder, n)] for n in found["parts"]]
        parts = {int(number): float(received) for number, received in found["parts"]}
        return Manifest(parts, int(found["logged_through"]), int(found["next_number"]))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{folder / MANIFEST} cannot be read ({error}): restore it from a backup") from error


def _written(folder: Path, number: int) -> float:
    try:
        return part_path(folder, number).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def write(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest durably. Raises OSError."""
    content = {
        "schema": SCHEMA,
        "parts": sorted(manifest.parts.items()),
        "logged_through": manifest.logged_through,
        "next_number": manifest.next_number,
    }
    write_file(folder / MANIFEST, orjson.dumps(content))


def part_path(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"{number:012d}.part"


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or not there. Raises OSError, leaving nothing."""
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(folder: Path, live: Iterable[int]) -> None:
    """Unlink parts that no manifest names, and half-written files."""
    known = {part_path(folder, number) for number in live}
    for path in [*folder.glob("*.part"), *folder.glob("*.tmp")]:
        if path not in known:
            path.unlink()


def set_aside(path: Path) -> Path:
    """Move a damaged file out of the way, for a person to look at; returns where it is."""
    folder = path.parent / "damaged"
    folder.mkdir(exist_ok=True)
    target = folder / path.name
    os.replace(path, target)
    return target
