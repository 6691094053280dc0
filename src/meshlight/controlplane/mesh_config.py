"""Istio's MeshConfig: what ConfigMap `istio` (key `mesh`) says, as far as L4 is concerned.

Followed live: a text that cannot be read leaves the last readable one in force. Pure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import yaml

from meshlight.controlplane.settings import Mesh, NamespaceSelector
from meshlight.kube.resources import Object

NAME, KEY = "istio", "mesh"


class MeshConfigError(ValueError):
    """The mesh configuration cannot be used; the message names the field."""


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """The parts of MeshConfig that the L4 control plane follows; the rest is L7's."""

    trust_domain: str = ""
    trust_domain_aliases: tuple[str, ...] = ()
    discovery_selectors: tuple[NamespaceSelector, ...] = ()

    def laid_over(self, mesh: Mesh) -> Mesh:
        """The settings of the environment with these in their place; what is unsaid stays."""
        return dataclasses.replace(
            mesh,
            trust_domain=self.trust_domain or mesh.trust_domain,
            trust_domain_aliases=self.trust_domain_aliases,
            discovery_selectors=self.discovery_selectors,
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
    return MeshConfig(domain, tuple(aliases), _selectors(config.get("discoverySelectors") or []))


def _selectors(values: Any) -> tuple[NamespaceSelector, ...]:
    try:
        return tuple(NamespaceSelector.parse(value) for value in values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise MeshConfigError(f"discoverySelectors: {error}") from error
