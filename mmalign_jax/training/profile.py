"""A trace of a few steps, which XProf and Perfetto read."""

from pathlib import Path

import jax

DIRECTORY, _BEHIND = "profile", 2  # the first step of a run compiles, and the second may still wait for what the first began


class Profile:
    """Starts and stops a trace around `steps` steps, from the third of this process on.

    Args:
      directory: receives it, in `plugins/profile`.
      steps: 0: none.
    """

    def __init__(self, directory: Path, steps: int):
        self.directory, self._steps, self._seen, self._going = directory, steps, 0, False

    def before_step(self) -> None:
        if self._steps and self._seen == _BEHIND:
            jax.profiler.start_trace(self.directory)
            self._going = True
        self._seen += 1

    def after_step(self, result: object) -> bool:
        """Whether the trace is now written; `result` is waited for then."""
        if not self._going or self._seen < _BEHIND + self._steps:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that is going on."""
        if self._going:
            jax.profiler.stop_trace()
            self._going = False
