"""Attention over the KV cache: one interface and three back ends."""
