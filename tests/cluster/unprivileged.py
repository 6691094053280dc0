"""Runs a command as an unprivileged user who can reach this interpreter and checkout.

`python unprivileged.py UID COMMAND…`, as root, in a mount namespace of its own: where the interpreter or
the checkout lies below a folder that others may not enter (as root's home), that folder is replaced by an
empty one that shows only the way to them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STAGE = Path("/mnt")


def closed(path: Path) -> Path | None:
    """The outermost folder above `path` that others may not enter."""
    above = [folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001]
    return above[0] if above else None


def open_way(paths: list[Path]) -> None:
    """Make every path reachable for everyone, in this mount namespace."""
    ways: dict[Path, list[Path]] = {}
    for path in paths:
        if folder := closed(path):
            ways.setdefault(folder, []).append(path)
    if ways:
        run("mount", "-t", "tmpfs", "tmpfs", str(STAGE))
    for folder, below in ways.items():
        for number, path in enumerate(below):
            (STAGE / str(number)).mkdir()
            run("mount", "--rbind", str(path), str(STAGE / str(number)))
        run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder))
        for number, path in enumerate(below):
            path.mkdir(parents=True, exist_ok=True)
            run("mount", "--rbind", str(STAGE / str(number)), str(path))
            run("umount", "--recursive", "--lazy", str(STAGE / str(number)))
            (STAGE / str(number)).rmdir()
    if ways:
        run("umount", "--lazy", str(STAGE))


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    uid, *command = sys.argv[1:]
    open_way([Path(sys.base_prefix).resolve(), Path(sys.prefix), Path(__file__).parents[2]])
    ids = ["--reuid", uid, "--regid", uid, "--clear-groups"]
    os.execvp("setpriv", ["setpriv", *ids, "--", *command])


if __name__ == "__main__":
    main()
