"""Readers of training data, and the task the demo generates."""
