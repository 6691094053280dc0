"""`meshlight tracing`: run a tracing server on its own, back it up, restore it."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

import click

from meshlight.operations.errors import OperationError


@click.group()
def tracing() -> None:
    """Receive, keep and show traces on this machine: Jaeger's role, for any OpenTelemetry user."""


@tracing.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Run a tracing server until it is told to stop; `serve --help` lists its options.

    \b
    meshlight tracing serve                            a store in ~/.meshlight/tracing
    meshlight tracing serve --memory --max-traces 10000
    meshlight tracing serve --storage http://a:16686,http://b:16686
    """
    from meshlight.tracing.__main__ import run

    sys.exit(run(arguments))


def _ask(verb: str, admin: str, folder: Path) -> None:
    url = f"{admin.rstrip('/')}/{verb}?{urlencode({'dir': str(folder.absolute())})}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="POST")) as answer:
            click.echo(f"{verb}: {answer.read().decode().strip()}")
    except urllib.error.HTTPError as error:
        raise OperationError(f"{verb}: {error.read().decode().strip()}") from None
    except urllib.error.URLError as error:
        raise OperationError(f"{admin} cannot be reached ({error.reason}); does the server run?") from None


ADMIN = click.option(
    "--admin", default="http://127.0.0.1:14269", show_default=True, help="the server's admin port"
)


@tracing.command()
@click.argument("folder", type=click.Path(path_type=Path))
@ADMIN
def backup(folder: Path, admin: str) -> None:
    """Copy everything into the new FOLDER while the server runs."""
    _ask("backup", admin, folder)


@tracing.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@ADMIN
def restore(folder: Path, admin: str) -> None:
    """Add what a backup in FOLDER holds to a running server."""
    _ask("restore", admin, folder)
