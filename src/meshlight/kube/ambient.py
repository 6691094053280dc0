"""Labels and annotations by which pods and namespaces are in the mesh, and who cannot be captured.

Istio's own words, shared by the node agent, which acts on them, and by the verbs, which explain. Pure.
"""

from __future__ import annotations

from meshlight.kube.resources import Object

DATAPLANE_MODE = "istio.io/dataplane-mode"
REDIRECTION = "ambient.istio.io/redirection"
SIDECAR_STATUS = "sidecar.istio.io/status"


def asked(pod: Object, namespace_mode: str | None) -> bool:
    """Whether labels ask for a pod to be in the mesh; `istio.io/rev` makes no difference, there is one."""
    labels = pod["metadata"].get("labels") or {}
    return bool(labels.get(DATAPLANE_MODE, namespace_mode) == "ambient")


def obstacle(pod: Object) -> str:
    """Why a pod cannot be captured, whatever its labels ask for; empty if it can."""
    if pod["spec"].get("hostNetwork"):
        return "it is on the host's network, which it shares with other programs"
    if SIDECAR_STATUS in (pod["metadata"].get("annotations") or {}):
        return f"it has a sidecar (annotation {SIDECAR_STATUS})"
    return ""
