"""Makers of preferences: views of an image, sources of answers, scorers and selectors."""
