"""`meshlight completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that completes meshlight's verbs, options and clusters in SHELL.

    \b
    source <(meshlight completion bash)            now, or in ~/.bashrc
    source <(meshlight completion zsh)             now, or in ~/.zshrc
    meshlight completion fish | source             now, or in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "meshlight", "_MESHLIGHT_COMPLETE").source())
