"""A columnar store of records that have a trace id: log in front, immutable parts behind.

Knows nothing of HTTP, gRPC or Kubernetes. Records come in as rows (`meshlight.tracing.rows`) and go
out as spans or log records (`meshlight.tracing.model`).
"""
