"""Jaeger's role: receives spans and flow records, keeps them, and answers questions about them."""
