"""Measuring hallucination: one file a benchmark, and the generation that they share."""
