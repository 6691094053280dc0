"""What a tracing server is told on its command line. Jaeger's flags that mean something here are taken."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from meshlight.tracing.storage import Retention

PORTS = {
    "otlp-grpc": 4317,
    "otlp-http": 4318,
    "zipkin": 9411,
    "jaeger-grpc": 14250,
    "jaeger-http": 14268,
    "sampling": 5778,
    "query-grpc": 16685,
    "query": 16686,
    "admin": 14269,
    "health": 13133,
}


class SettingsError(ValueError):
    """An argument that cannot be understood; the message names it and says what would be right."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`storage`: a folder, None for memory, or URLs of stores; `ports` by PORTS' names, 0 for off."""

    storage: Path | None = None
    peers: tuple[str, ...] = ()
    max_traces: int = 0
    retention: Retention = field(default_factory=Retention)
    host: str = ""
    """Empty: every address of both families."""
    ports: dict[str, int] = field(default_factory=lambda: dict(PORTS))
    sampling_file: Path | None = None
    sampling_rate: float = 1.0


_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def size(text: str) -> int:
    """Bytes of `10Gi`, `500M`. Raises SettingsError."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]i?)?[bB]?", text)
    if not matched:
        raise SettingsError(f"{text!r} is no size: write it as 10Gi or 500Mi")
    return int(float(matched[1]) * _SIZES[(matched[2] or "").lower()])


def seconds(text: str) -> float:
    """Seconds of `48h`, `7d`. Raises SettingsError."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not matched:
        raise SettingsError(f"{text!r} is no age: write it as 48h or 7d")
    return float(matched[1]) * _TIMES[matched[2]]


def parser() -> argparse.ArgumentParser:
    """The command line of the pod and of `meshlight tracing serve`."""
    made = argparse.ArgumentParser(prog="meshlight tracing serve", description="Receive, keep and show traces.")
    add = made.add_argument
    add(
        "--storage", default="", metavar="DIR|URL,URL", help="folder of the store, or the stores to spread over"
    )
    add("--memory", action="store_true", help="keep nothing on disk")
    add("--max-traces", "--memory.max-traces", type=int, default=10_000, help="with --memory: traces kept")
    add("--retention", default="7d", help="age beyond which spans are dropped (0: never)")
    add("--max-size", default="10Gi", help="size beyond which the oldest are dropped (0: none)")
    tail = "over the size, first thin old traces: errors and the slowest stay, and this share of the rest"
    add("--keep-tail", type=float, default=0.0, metavar="SHARE", help=tail)
    add("--host", default="", help="address to listen on  [every one of both families]")
    names = f"another port, 0 for off; names: {', '.join(PORTS)}"
    add("--port", action="append", default=[], metavar="NAME=PORT", help=names)
    add("--sampling.strategies-file", dest="sampling_file", default="", help="what clients are told to sample")
    add("--sampling-rate", type=float, default=1.0, help="what clients are told without a file")
    return made


def from_arguments(arguments: argparse.Namespace) -> Settings:
    """Settings of parsed arguments. Raises SettingsError."""
    ports = dict(PORTS)
    for text in arguments.port:
        name, equals, number = text.partition("=")
        if name not in PORTS or not equals or not number.isdigit() or int(number) > 65535:
            raise SettingsError(f"--port {text!r}: write it as NAME=PORT with a name of {', '.join(PORTS)}")
        ports[name] = int(number)
    if not 0 <= arguments.keep_tail < 1:
        raise SettingsError(f"--keep-tail {arguments.keep_tail}: must be a share from 0 to below 1")
    if arguments.max_traces < 1:
        raise SettingsError(f"--max-traces {arguments.max_traces}: must be at least 1")
    peers: tuple[str, ...] = ()
    folder: Path | None = None
    if arguments.storage and arguments.memory:
        raise SettingsError("--storage and --memory exclude each other")
    if re.match(r"https?://", arguments.storage):
        peers = tuple(url.strip().rstrip("/") for url in arguments.storage.split(","))
        if any(not re.match(r"https?://[^/]+$", url) for url in peers):
            raise SettingsError("--storage: every URL must be http://HOST:PORT, with commas between them")
    elif not arguments.memory:
        default = Path(os.environ.get("MESHLIGHT_HOME", Path.home() / ".meshlight")) / "tracing"
        folder = Path(arguments.storage) if arguments.storage else default
    age = seconds(arguments.retention) if arguments.retention != "0" else 0.0
    return Settings(
        storage=folder,
        peers=peers,
        max_traces=arguments.max_traces if arguments.memory else 0,
        retention=Retention(age, size(arguments.max_size), arguments.keep_tail),
        host=arguments.host,
        ports=ports,
        sampling_file=Path(arguments.sampling_file) if arguments.sampling_file else None,
        sampling_rate=arguments.sampling_rate,
    )
