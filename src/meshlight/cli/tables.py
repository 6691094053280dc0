"""How tables look on a terminal."""

from __future__ import annotations

from rich.table import Table


def mark(ready: bool) -> str:
    """Yes in green, no in red."""
    return "[green]yes[/green]" if ready else "[red]no[/red]"


def rows(header: tuple[str, ...], cells: list[tuple[str, ...]]) -> Table:
    """A borderless table as kubectl would print it."""
    table = Table(box=None, pad_edge=False)
    for title in header:
        table.add_column(title, no_wrap=title != "IDENTITY", overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table
