"""The two errors that a user can cause. Anything else that is raised is a defect of this package."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a path or a checkpoint that the user can mend. The commands print it as one line and exit with 2."""


class DataError(UserError):
    """A row or a file of a data set that cannot be used.

    Args:
      problem: what is wrong, in words.
      file: the file that holds the row.
      row: the row's id or number, or "" when the whole file is meant.
      mend: what the user can do about it.
    """

    def __init__(self, problem: str, *, file: str, row: str = "", mend: str):
        self.problem, self.file, self.row, self.mend = problem, file, row, mend
        where = f"{file}, row {row}" if row else file
        super().__init__(f"{where}: {problem}. {mend}")


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """` Did you mean X?`, X being the known word that is most like `key`; "" when none is."""
    match = difflib.get_close_matches(key, list(known), n=1)
    return f" Did you mean {match[0]}?" if match else ""
