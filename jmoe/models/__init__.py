"""Flax modules: the attention half, the expert half, and the reference forward composed of both."""
