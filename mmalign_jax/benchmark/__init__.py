"""How fast this package is beside others, measured in one run: each side in a process of its own, in turn."""
