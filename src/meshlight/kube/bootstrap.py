"""What a new cluster's API holds from its first start: the system namespaces."""

from __future__ import annotations

from meshlight.kube.rest import Rest, Target, WriteOptions
from meshlight.kube.status import StatusError

NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")


def bootstrap(rest: Rest) -> None:
    """Create what is missing; what exists stays as it is."""
    served = rest.catalog.lookup("", "v1", "namespaces")
    assert served is not None
    for name in NAMESPACES:
        try:
            rest.create(Target(served), {"metadata": {"name": name}}, WriteOptions())
        except StatusError as error:
            if error.reason != "AlreadyExists":
                raise
