"""Waypoints and gateways as objects: what a Gateway deploys, what its status says, and the proxy's start."""
