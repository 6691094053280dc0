"""Istio's command line of `pilot-discovery`, so that its own Deployment starts this istiod.

Flags win over the environment. Addresses are `HOST:PORT`, or `:PORT` for every address.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from meshlight.controlplane.settings import LOG_LEVELS, Settings, SettingsError

_PORTS = {
    "grpcAddr": "grpc_port",
    "secureGRPCAddr": "secure_grpc_port",
    "monitoringAddr": "monitoring_port",
    "httpAddr": "probe_port",
}


def parser() -> argparse.ArgumentParser:
    """The parser; unknown flags of Istio's are the caller's to report."""
    result = argparse.ArgumentParser(prog="python -m meshlight.controlplane", allow_abbrev=False)
    result.add_argument("command", nargs="?", choices=["discovery"], help="the only command, and the default")
    result.add_argument("--kubeconfig", help="reach the API through this file, not the pod's account")
    result.add_argument("--domain", help="the cluster's DNS domain")
    result.add_argument("--log_output_level", help="SCOPE:LEVEL,…; the level of `default` counts for all")
    for flag, port in _PORTS.items():
        result.add_argument(f"--{flag}", metavar="[HOST]:PORT", help=f"where to listen ({port})")
    return result


def from_arguments(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """Settings with the flags laid over them; raises SettingsError naming a bad flag."""
    ports: dict[str, Any] = {}
    for flag, field in _PORTS.items():
        if (text := getattr(arguments, flag)) is not None:
            port = text.rpartition(":")[2]
            if not port.isdigit() or not 0 < int(port) < 65536:
                raise SettingsError(f"--{flag}: {text!r} is not [HOST]:PORT")
            ports[field] = int(port)
    settings = dataclasses.replace(settings, **ports)
    if arguments.domain:
        mesh = dataclasses.replace(settings.mesh, cluster_domain=arguments.domain)
        settings = dataclasses.replace(settings, mesh=mesh)
    if arguments.log_output_level:
        settings = dataclasses.replace(settings, log_level=_level(arguments.log_output_level))
    return settings


def _level(text: str) -> str:
    for part in text.split(","):
        scope, colon, level = part.rpartition(":")
        if not colon or scope in ("default", "all"):
            if level not in LOG_LEVELS:
                raise SettingsError(f"--log_output_level: {level!r} is not one of {', '.join(LOG_LEVELS)}")
            return level
    return "info"
