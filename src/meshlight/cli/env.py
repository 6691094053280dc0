"""`meshlight env` and `meshlight shell`: shells in which `kubectl` and `istioctl` find the cluster."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import click

from meshlight.cli.cluster import name_option
from meshlight.embedded.layout import Layout
from meshlight.operations.shims import install


def _environment(name: str) -> dict[str, str]:
    layout = Layout(name)
    if not layout.kubeconfig.exists():
        raise click.ClickException(f"no cluster {name} yet: `meshlight up --name {name}` makes it")
    folder = install(layout.state / "bin")
    path = os.environ.get("PATH", "")
    parts = [part for part in path.split(os.pathsep) if Path(part) != folder]
    # Behind the user's own: a real istioctl is used where there is one.
    return {"KUBECONFIG": str(layout.kubeconfig), "PATH": os.pathsep.join([*parts, str(folder)])}


@click.command()
@name_option
def env(name: str) -> None:
    """Print the settings of a shell that speaks to the cluster: eval "$(meshlight env)".

    They point KUBECONFIG at it, and offer `istioctl` on PATH where this machine has none.
    """
    for key, value in _environment(name).items():
        click.echo(f"export {key}={shlex.quote(value)}")


@click.command()
@name_option
def shell(name: str) -> None:
    """Start a shell that speaks to the cluster; see `meshlight env`."""
    program = os.environ.get("SHELL") or shutil.which("bash") or "/bin/sh"
    os.execvpe(program, [program], os.environ | _environment(name))
