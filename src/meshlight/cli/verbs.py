"""Which module has which verb: each is imported when it is called, so that every verb starts at once."""

from __future__ import annotations

import copy
import importlib

import click

VERBS = {
    "analyze": "analyze:analyze",
    "ca": "ca:ca",
    "completion": "completion:completion",
    "down": "cluster:down",
    "env": "env:env",
    "expose": "expose:expose",
    "flows": "flows:flows",
    "kubeconfig": "cluster:kubeconfig",
    "list": "cluster:list_",
    "node": "node:node",
    "policy": "policy:policy",
    "proxy-status": "istioctl:proxy_status",
    "run": "run:run",
    "shell": "env:shell",
    "status": "status:status",
    "traces": "traces:traces",
    "tracing": "tracing:tracing",
    "up": "cluster:up",
    "verify-install": "istioctl:verify_install",
    "version": "istioctl:version",
    "waypoint": "waypoint:waypoint",
    "why": "why:why",
    "ztunnel-config": "ztunnel_config:ztunnel_config",
}
SHORT = {"ps": "proxy-status", "zc": "ztunnel-config"}
"""istioctl's short names; not shown in the help."""


class Verbs(click.Group):
    """The group of all verbs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, as the help and completion show them."""
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of a name, imported now."""
        place = VERBS.get(SHORT.get(cmd_name, cmd_name))
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        verb: click.Command = getattr(importlib.import_module(f"meshlight.cli.{module}"), attribute)
        if cmd_name in SHORT:
            verb = copy.copy(verb)
            verb.hidden = True
        return verb
