"""Meshlight: an Istio-compatible ambient mesh on one Linux machine."""

__version__ = "0.1.0"
