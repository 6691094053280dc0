"""Small programs under other tools' names that hand over to `meshlight`, for machines without those tools."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

# Tool names and the words of `meshlight` that take their place.
SHIMS: dict[str, tuple[str, ...]] = {"istioctl": ()}


def install(folder: Path) -> Path:
    """Write the shims into a folder (made if missing); returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in SHIMS.items():
        command = " ".join(shlex.quote(part) for part in (sys.executable, "-m", "meshlight.cli.main", *words))
        path = folder / name
        text = f'#!/bin/sh\n# Stands in for {name} where there is none.\nexec {command} "$@"\n'
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            path.chmod(0o755)
    return folder
