"""Istio's MeshConfig: what ConfigMap `istio` (key `mesh`) says, as far as the control plane follows it.

Followed live: a text that cannot be read leaves the last readable one in force. Pure.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import yaml

from meshlight.controlplane.settings import ExtensionProvider, Mesh, NamespaceSelector, Tracing
from meshlight.kube.resources import Object

NAME, KEY = "istio", "mesh"
NO_TRACING = Tracing()


class MeshConfigError(ValueError):
    """The mesh configuration cannot be used; the message names the field."""


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """The parts of MeshConfig that the L4 control plane follows; the rest is L7's."""

    trust_domain: str = ""
    trust_domain_aliases: tuple[str, ...] = ()
    discovery_selectors: tuple[NamespaceSelector, ...] = ()
    extension_providers: tuple[ExtensionProvider, ...] = ()
    tracing: Tracing = NO_TRACING
    access_log: bool = False

    def laid_over(self, mesh: Mesh) -> Mesh:
        """The settings of the environment with these in their place; what is unsaid stays."""
        return dataclasses.replace(
            mesh,
            trust_domain=self.trust_domain or mesh.trust_domain,
            trust_domain_aliases=self.trust_domain_aliases,
            discovery_selectors=self.discovery_selectors,
            extension_providers=self.extension_providers,
            tracing=self.tracing,
            access_log=self.access_log,
        )


def parse(config_map: Object | None) -> MeshConfig:
    """Read the ConfigMap; raises MeshConfigError. None (no ConfigMap) says nothing."""
    text = ((config_map or {}).get("data") or {}).get(KEY) or ""
    try:
        config: Any = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise MeshConfigError(f"data.{KEY}: not YAML: {error}") from error
    if not isinstance(config, dict):
        raise MeshConfigError(f"data.{KEY}: a mapping is expected, not {type(config).__name__}")
    domain, aliases = config.get("trustDomain") or "", config.get("trustDomainAliases") or []
    if not isinstance(domain, str) or "/" in domain:
        raise MeshConfigError(f"trustDomain: {domain!r} is no trust domain")
    if not isinstance(aliases, list) or not all(isinstance(a, str) and a and "/" not in a for a in aliases):
        raise MeshConfigError("trustDomainAliases: a list of trust domains is expected")
    selectors = _selectors(config.get("discoverySelectors") or [])
    providers = _providers(config.get("extensionProviders") or [])
    access_log = bool(config.get("accessLogFile"))
    return MeshConfig(domain, tuple(aliases), selectors, providers, _tracing(config), access_log)


def _tracing(config: dict[str, Any]) -> Tracing:
    """`enableTracing` and `defaultConfig.tracing`; Istio's default sampling is one request in a hundred."""
    tracing = (config.get("defaultConfig") or {}).get("tracing") or {}
    try:
        sampling = float(tracing.get("sampling", 1.0))
    except (TypeError, ValueError):
        raise MeshConfigError("defaultConfig.tracing.sampling: a number of percent is expected") from None
    address = str((tracing.get("zipkin") or {}).get("address") or "")
    if address and not address.rpartition(":")[2].isdigit():
        raise MeshConfigError(f"defaultConfig.tracing.zipkin.address: {address!r} is not HOST:PORT")
    return Tracing(address, sampling, config.get("enableTracing", True) is not False)


def _providers(values: Any) -> tuple[ExtensionProvider, ...]:
    """Istio's form: a name, and one more field that says of which kind it is."""
    providers = []
    for index, value in enumerate(values if isinstance(values, list) else [None]):
        kinds = [key for key in value if key != "name"] if isinstance(value, dict) else []
        if len(kinds) != 1 or not isinstance(value.get("name"), str):
            raise MeshConfigError(f"extensionProviders[{index}]: a name and one provider are expected")
        text = json.dumps(value[kinds[0]] or {}, sort_keys=True)
        providers.append(ExtensionProvider(value["name"], kinds[0], text))
    return tuple(providers)


def _selectors(values: Any) -> tuple[NamespaceSelector, ...]:
    try:
        return tuple(NamespaceSelector.parse(value) for value in values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise MeshConfigError(f"discoverySelectors: {error}") from error
