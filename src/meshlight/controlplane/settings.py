"""What the environment decides about istiod, read once, under Istio's own variable names.

Everything else of the package receives a `Settings` and never looks at the environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

LOG_LEVELS = ("debug", "info", "warn", "error")


class SettingsError(ValueError):
    """An environment variable has a value that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """A Kubernetes service account."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class NamespaceSelector:
    """A label selector of namespaces (`discoverySelectors`): all labels and all expressions must hold."""

    labels: tuple[tuple[str, str], ...]
    expressions: tuple[tuple[str, str, frozenset[str]], ...]

    @classmethod
    def parse(cls, selector: Mapping[str, Any]) -> NamespaceSelector:
        """Read a LabelSelector; raises ValueError for an operator that there is not, KeyError for a gap."""
        expressions = []
        for expression in selector.get("matchExpressions") or []:
            operator = expression["operator"]
            if operator not in ("In", "NotIn", "Exists", "DoesNotExist"):
                raise ValueError(f"{operator!r} is not one of In, NotIn, Exists, DoesNotExist")
            expressions.append((expression["key"], operator, frozenset(expression.get("values") or [])))
        return cls(tuple(sorted((selector.get("matchLabels") or {}).items())), tuple(expressions))

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a namespace of these labels is selected."""
        if any(labels.get(name) != value for name, value in self.labels):
            return False
        for key, operator, values in self.expressions:
            present = key in labels
            held = {
                "In": present and labels[key] in values,
                "NotIn": not present or labels[key] not in values,
                "Exists": present,
                "DoesNotExist": not present,
            }[operator]
            if not held:
                return False
        return True


@dataclass(frozen=True, slots=True)
class ExtensionProvider:
    """An `extensionProviders` entry of the mesh configuration: `kind` is its one field beside the name."""

    name: str
    kind: str
    text: str
    """The settings of the kind, as JSON."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the kind."""
        decoded: dict[str, Any] = json.loads(self.text)
        return decoded


@dataclass(frozen=True, slots=True)
class Tracing:
    """Where spans go: a Zipkin collector as HOST:PORT, and the share (percent) of requests traced."""

    zipkin: str = ""
    sampling: float = 1.0
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Mesh:
    """Names every part of the control plane agrees on."""

    root_namespace: str = "istio-system"
    trust_domain: str = "cluster.local"
    cluster_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    network: str = ""
    trust_domain_aliases: tuple[str, ...] = ()
    discovery_selectors: tuple[NamespaceSelector, ...] = ()
    extension_providers: tuple[ExtensionProvider, ...] = ()
    tracing: Tracing = Tracing()
    access_log: bool = False

    def hostname(self, service: str, namespace: str) -> str:
        """The full name of a Kubernetes Service."""
        return f"{service}.{namespace}.svc.{self.cluster_domain}"

    def discovers(self, labels: Mapping[str, str]) -> bool:
        """Whether objects of a namespace of these labels are seen at all."""
        return not self.discovery_selectors or any(s.matches(labels) for s in self.discovery_selectors)


@dataclass(frozen=True, slots=True)
class Settings:
    """istiod's configuration; ports are TCP, addresses are what the sockets bind."""

    mesh: Mesh = Mesh()
    bind_address: str = "0.0.0.0"
    grpc_port: int = 15010
    secure_grpc_port: int = 15012
    monitoring_port: int = 15014
    probe_port: int = 8080
    debounce: timedelta = timedelta(milliseconds=5)
    debounce_limit: timedelta = timedelta(milliseconds=25)
    token_audience: str = "istio-ca"
    trusted_node_accounts: frozenset[ServiceAccount] = frozenset({ServiceAccount("istio-system", "ztunnel")})
    default_certificate_lifetime: timedelta = timedelta(hours=24)
    maximum_certificate_lifetime: timedelta = timedelta(days=90)
    root_lifetime: timedelta = timedelta(days=3650)
    plaintext_needs_token: bool = True
    log_level: str = "info"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the variables of Istio's `pilot-discovery`; raises SettingsError naming the first bad one."""
        root_namespace = environment.get("POD_NAMESPACE", "istio-system")
        domain = environment.get("CLUSTER_DOMAIN") or environment.get("DOMAIN_SUFFIX") or "cluster.local"
        mesh = Mesh(
            root_namespace=root_namespace,
            trust_domain=environment.get("TRUST_DOMAIN") or domain,
            cluster_domain=domain,
            cluster_id=environment.get("CLUSTER_ID", "Kubernetes"),
            network=environment.get("NETWORK", ""),
        )
        level = environment.get("LOG_LEVEL", "info")
        if level not in LOG_LEVELS:
            raise SettingsError(f"LOG_LEVEL: {level!r} is not one of {', '.join(LOG_LEVELS)}")
        return cls(
            mesh=mesh,
            bind_address=environment.get("BIND_ADDRESS", "0.0.0.0"),
            grpc_port=_port(environment, "GRPC_PORT", 15010),
            secure_grpc_port=_port(environment, "SECURE_GRPC_PORT", 15012),
            monitoring_port=_port(environment, "MONITORING_PORT", 15014),
            probe_port=_port(environment, "HTTP_PORT", 8080),
            debounce=_duration(environment, "PILOT_DEBOUNCE_AFTER", timedelta(milliseconds=5)),
            debounce_limit=_duration(environment, "PILOT_DEBOUNCE_MAX", timedelta(milliseconds=25)),
            token_audience=environment.get("TOKEN_AUDIENCES", "istio-ca").split(",")[0].strip(),
            trusted_node_accounts=_accounts(environment, f"{root_namespace}/ztunnel"),
            default_certificate_lifetime=_duration(
                environment, "DEFAULT_WORKLOAD_CERT_TTL", timedelta(hours=24)
            ),
            maximum_certificate_lifetime=_duration(environment, "MAX_WORKLOAD_CERT_TTL", timedelta(days=90)),
            root_lifetime=_duration(environment, "CITADEL_SELF_SIGNED_CA_CERT_TTL", timedelta(days=3650)),
            plaintext_needs_token=_boolean(environment, "XDS_AUTH_PLAINTEXT", True),
            log_level=level,
        )


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6}


def parse_duration(text: str) -> timedelta:
    """A Go duration such as `24h0m0s` or `10ms`; raises ValueError when it is none or not positive."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|us|h|m|s)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration such as 24h0m0s")
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if total <= 0:
        raise ValueError(f"{text!r} is not a positive duration")
    return timedelta(seconds=total)


def _duration(environment: Mapping[str, str], name: str, default: timedelta) -> timedelta:
    if not environment.get(name):
        return default
    try:
        return parse_duration(environment[name])
    except ValueError as error:
        raise SettingsError(f"{name}: {error}") from error


def _port(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise SettingsError(f"{name}: {text!r} is not a port number (1 to 65535)")
    return int(text)


def _boolean(environment: Mapping[str, str], name: str, default: bool) -> bool:
    text = environment.get(name, str(default)).lower()
    if text not in ("true", "false", "1", "0"):
        raise SettingsError(f"{name}: {text!r} is not true or false")
    return text in ("true", "1")


def _accounts(environment: Mapping[str, str], default: str) -> frozenset[ServiceAccount]:
    accounts = set()
    for entry in environment.get("CA_TRUSTED_NODE_ACCOUNTS", default).split(","):
        if not (entry := entry.strip()):
            continue
        namespace, slash, name = entry.partition("/")
        if not (slash and namespace and name):
            raise SettingsError(f"CA_TRUSTED_NODE_ACCOUNTS: {entry!r} is not NAMESPACE/SERVICE-ACCOUNT")
        accounts.add(ServiceAccount(namespace, name))
    return frozenset(accounts)
