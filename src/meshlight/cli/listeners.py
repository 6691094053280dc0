"""How the machine's listeners for Services are shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table


def listener_table(entries: Iterable[dict[str, Any]]) -> Table:
    """One line a listener: where it is on the machine, and where it leads."""
    table = Table(box=None, pad_edge=False)
    for title in ("ON THIS MACHINE", "PROTOCOL", "NAMESPACE", "SERVICE", "PORT", "ADDRESS"):
        table.add_column(title, no_wrap=True)
    for entry in entries:
        port = f"{entry['port']} ({entry['name']})" if entry.get("name") else str(entry["port"])
        table.add_row(
            f"{entry['address']}:{entry['hostPort']}",
            entry["protocol"],
            entry["namespace"],
            entry["service"],
            port,
            entry["target"],
        )
    return table
