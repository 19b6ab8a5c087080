"""Executors: what runs the two role programs."""
