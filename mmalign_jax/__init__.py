"""Preference alignment of multimodal LLMs in JAX."""

__version__ = "0.1.0"
