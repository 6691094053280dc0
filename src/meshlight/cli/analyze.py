"""`meshlight analyze`, as `istioctl analyze`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from meshlight.cli.target import Target, document, table, target_options
from meshlight.kube.client import Client
from meshlight.operations import mesh_snapshot
from meshlight.operations.analysis import engine, manifests, messages
from meshlight.operations.analysis.engine import Suppression
from meshlight.operations.analysis.messages import Level
from meshlight.operations.mesh_snapshot import Snapshot

FOUND_ISSUES = 79
"""istioctl's exit code when messages reach the failure threshold."""

_LEVELS = click.Choice([level.word for level in Level], case_sensitive=False)


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("-n", "--namespace", default="default", show_default=True)
@click.option("-A", "--all-namespaces", is_flag=True)
@click.option("-k", "--use-kube/--no-use-kube", default=True, help="look at the cluster too  [default: yes]")
@click.option(
    "-S", "--suppress", multiple=True, metavar="CODE=KIND NAME.NAMESPACE", help="not to tell (repeatable)"
)
@click.option("--failure-threshold", type=_LEVELS, default="Error", show_default=True)
@click.option("--output-threshold", type=_LEVELS, default="Info", show_default=True)
@click.option("-L", "--list-analyzers", is_flag=True, help="list the messages that there may be")
@click.option("-o", "--output", type=click.Choice(["log", "table", "json", "yaml"]), default="log")
@target_options
def analyze(
    target: Target, files: tuple[Path, ...], namespace: str, all_namespaces: bool, use_kube: bool,
    suppress: tuple[str, ...], failure_threshold: str, output_threshold: str, list_analyzers: bool, output: str,
) -> None:  # fmt: skip
    """Say what is wrong, or may be, with the configuration of the mesh and of FILES.

    Exit code 79 when a message is at least of the failure threshold, as istioctl's.
    """
    if list_analyzers:
        click.echo(table(("CODE", "LEVEL", "NAME"), [(k.code, k.level.word, k.name) for k in messages.ALL]))
        return
    silent = [_suppression(text) for text in suppress]
    extra = manifests.read(files, namespace)

    async def read(client: Client) -> Snapshot:
        return await mesh_snapshot.read(client, target.istio_namespace, engine.ALSO, extra)

    snapshot = target.run(read) if use_kube else Snapshot.of(extra)
    scope = "" if all_namespaces or not use_kube else namespace
    found = engine.analyze(snapshot, extra, scope, silent)
    shown = [message for message in found if message.kind.level >= _level(output_threshold)]
    if output in ("json", "yaml"):
        click.echo(document([message.plain() for message in shown], output))
    elif output == "table":
        rows = [(m.kind.level.word, m.kind.code, m.origin, m.reference, m.text) for m in shown]
        click.echo(table(("LEVEL", "CODE", "OBJECT", "FILE", "MESSAGE"), rows))
    else:
        for message in shown:
            click.echo(message.line())
    if not shown:
        what = ", ".join(str(path) for path in files) or (
            "all namespaces" if not scope else f"namespace: {scope}"
        )
        click.echo(f"✔ No validation issues found when analyzing {what}.", err=True)
    if any(message.kind.level >= _level(failure_threshold) for message in found):
        if output == "log":
            click.echo("Error: Analyzers found issues.", err=True)
        sys.exit(FOUND_ISSUES)


def _level(word: str) -> Level:
    return Level[word.upper()]


def _suppression(text: str) -> Suppression:
    code, equals, resource = text.partition("=")
    if not equals or not resource:
        raise click.BadParameter(f"{text!r} is not CODE=KIND NAME.NAMESPACE", param_hint="--suppress")
    return Suppression(code, resource)
