"""The same checkpoint here and in transformers, number by number. Only `theirs` imports torch, and only `compare` imports `theirs`."""
