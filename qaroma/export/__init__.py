"""Adapters as other tools read them."""
