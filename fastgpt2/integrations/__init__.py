"""Integrations: what other libraries can call."""
