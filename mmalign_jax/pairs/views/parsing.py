"""What a user writes for a view -> `View`."""

from mmalign_jax.pairs.calls import Table
from mmalign_jax.pairs.views.table import BY_NAME
from mmalign_jax.pairs.views.view import View

TABLE = Table("view", BY_NAME, "diffusion(500)")


def names() -> tuple[str, ...]:
    return tuple(BY_NAME)


def usage(name: str) -> str:
    """A line that says how view `name` is written: its arguments, what they may be, and their defaults."""
    return TABLE.usage(name)


def parse(text: str, where: str = "view") -> View:
    """Reads a view: a name, and its arguments in brackets, by place or by name, as in "random_crop(0.01, scale_max=0.2)".

    Args:
      where: what errors begin with, such as the setting's name.

    Raises:
      UserError: see `calls.Table.read`.
    """
    name, values = TABLE.read(text, where)
    return View(name, tuple(values.items()))
