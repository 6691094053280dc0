"""Which cluster a verb speaks to, and how tables and documents are printed: shared by istioctl's verbs."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson
import yaml

from meshlight.embedded.layout import Layout
from meshlight.kube.client import Client

T = TypeVar("T")
Command = Callable[..., Any]


class Target:
    """An API to speak to, named by flags, else by KUBECONFIG, else the embedded cluster."""

    def __init__(self, kubeconfig: str | None, context: str | None, istio_namespace: str) -> None:
        self.istio_namespace = istio_namespace
        self._path = kubeconfig or os.environ.get("KUBECONFIG") or str(Layout("cluster-101").kubeconfig)
        self._context = context

    def run(self, work: Callable[[Client], Awaitable[T]]) -> T:
        """Do something with a client of that API."""

        async def main() -> T:
            try:
                client = Client.from_kubeconfig(Path(self._path.split(os.pathsep)[0]), self._context)
            except ValueError as error:
                raise click.ClickException(str(error)) from error
            async with client:
                return await work(client)

        return asyncio.run(main())


def target_options(command: Command) -> Command:
    """istioctl's flags for the cluster; the command receives a `target`."""

    @click.option("-c", "--kubeconfig", help="kubeconfig file  [default: $KUBECONFIG, else cluster-101's]")
    @click.option("--context", help="context of the kubeconfig  [default: the current one]")
    @click.option("-i", "--istioNamespace", "istio_namespace", default="istio-system", show_default=True)
    @functools.wraps(command)
    def with_target(
        *args: Any, kubeconfig: str | None, context: str | None, istio_namespace: str, **rest: Any
    ) -> Any:
        return command(*args, target=Target(kubeconfig, context, istio_namespace), **rest)

    return with_target


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table: columns as wide as they must be, three spaces between, nothing wrapped."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def document(content: Any, output: str) -> str:
    """A value as JSON or YAML."""
    if output == "yaml":
        return yaml.safe_dump(content, sort_keys=False).rstrip("\n")
    return orjson.dumps(content, option=orjson.OPT_INDENT_2).decode()
