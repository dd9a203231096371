"""Objectives by name, one a file: `objective(*, hyper-parameters)` returns the terms of the loss. See mmalign_jax/losses/parts.py."""
