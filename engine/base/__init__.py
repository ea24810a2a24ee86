"""Basis of all other packages: errors, PackedBatch, Completion, random orders, estimates,
memory."""
