"""The models: the only package that imports flax. Outside, a model is its config, a nested dict of arrays, and pure functions."""
