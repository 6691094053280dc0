"""Black-box tests of the tracing server. A package, so that its conftest does not hide that of `cluster`."""
