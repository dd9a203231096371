"""`python profiled_steps.py DIR STEPS ASKED`: steps under `Profile`, in a process of their own. Prints what it was told after each.

In a process that has loaded libtpu for its compiler, as tests of `aot` do, jax' profiler ends the process.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from mmalign_jax.training.profile import Profile

if __name__ == "__main__":
    directory, steps, asked = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    profile, told, row = Profile(directory, asked), [], jnp.ones(8)

    @jax.jit
    def traced_step(x):
        return x * 2

    try:
        for _ in range(steps):
            profile.before_step()
            told.append(profile.after_step(traced_step(row)))
    finally:
        profile.close()
    print(json.dumps(told))
