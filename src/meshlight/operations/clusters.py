"""The embedded clusters of this user on this machine."""

from __future__ import annotations

from typing import Any

from meshlight.embedded.layout import Layout, LayoutError, Record, clusters


def described() -> list[dict[str, Any]]:
    """`{cluster, state, nodes, api, kubeconfig}` of each cluster; `state` is up, down or broken."""
    found = []
    for name in clusters():
        layout = Layout(name)
        try:
            record = Record.read(layout)
        except LayoutError:
            record = None
        running = record is not None and record.running()
        found.append(
            {
                "cluster": name,
                "state": "up" if running else "down" if record else "broken",
                "nodes": record.nodes if record else 0,
                "api": f"https://127.0.0.1:{record.api_port}" if record and running else "",
                "kubeconfig": str(layout.kubeconfig),
            }
        )
    return found
