"""Tiny random checkpoints of every family, and transformers' own view of them, for the tests that run on all families."""
