"""Decoder-only transformers: configuration table, fused weights, training forward, heads."""
