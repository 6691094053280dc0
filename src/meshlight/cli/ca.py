"""`meshlight ca`."""

from __future__ import annotations

import dataclasses

import click

from meshlight.cli.target import Target, document, target_options
from meshlight.operations import authority_rotation as operation


@click.group()
def ca() -> None:
    """The mesh's certificate authority."""


@ca.command()
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text")
@target_options
def status(target: Target, output: str) -> None:
    """Say which authority signs, which roots are trusted, and where a rotation stands."""
    found = target.run(lambda client: operation.state(client, target.istio_namespace))
    if output != "text":
        plain = dataclasses.asdict(found) | {"expires": found.expires.isoformat(), "roots": list(found.roots)}
        click.echo(document(plain, output))
        return
    click.echo(f"authority  {found.organization}, serial {found.serial}, from Secret {found.secret}")
    click.echo(f"expires    {found.expires:%Y-%m-%d %H:%M} UTC")
    click.echo(
        f"trusted    {', '.join(found.roots)}{'' if found.published else ' (not yet published everywhere)'}"
    )
    click.echo(f"rotation   {found.phase}{f' since {found.since}' if found.since else ''}")


@ca.command()
@click.option("--timeout", default=600.0, show_default=True, help="seconds until giving up")
@target_options
def rotate(target: Target, timeout: float) -> None:
    """Change the root: distribute the new one, sign with it, retire the old one.

    The node proxies are restarted after each step, which keeps connections. Interrupted, it can be
    run again and goes on where it stood.
    """
    target.run(
        lambda client: operation.rotate(
            client, target.istio_namespace, timeout, lambda text: click.echo(f"✔ {text}")
        )
    )
