"""Gin files and bindings that set the fields of a config (extra `gin`): `train.steps = 5`.

Only gin's parser is used, so that no configurable is registered and no state is left behind.
"""

import tokenize
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mmalign_jax import config_files
from mmalign_jax.errors import UserError


def apply(config: ConfigDict, files: Sequence[str | Path] = (), bindings: Sequence[str] = ()) -> None:
    """Sets the fields that gin files, then gin bindings, name; a later one wins.

    Raises:
      UserError: gin is not installed, a file is missing, a line cannot be parsed, a name is unknown, or a value has the wrong type.
    """
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--gin_file: {file}: no such file")
        _apply_text(config, Path(file).read_text(), str(file))
    for binding in bindings:
        _apply_text(config, binding, "--gin_bindings")


def _apply_text(config: ConfigDict, text: str, source: str) -> None:
    try:
        from gin import config_parser
    except ImportError as error:
        raise UserError('--gin_file and --gin_bindings need gin: pip install "mmalign_jax[gin]"') from error

    class Literals(config_parser.ParserDelegate):
        """Gin's references to Python objects have no meaning in a config of plain values."""

        def configurable_reference(self, scoped_configurable_name, evaluate):
            raise UserError(f"{source}: @{scoped_configurable_name}: references are not supported, give the value")

        def macro(self, macro_name):
            raise UserError(f"{source}: %{macro_name}: macros are not supported, give the value")

    try:
        statements = list(config_parser.ConfigParser(text, Literals()))
    except SyntaxError as error:
        raise UserError(f"{source}, line {error.lineno}: {' '.join(str(error.msg).split())}") from error
    except tokenize.TokenError as error:  # a bracket or a string that is never closed
        raise UserError(f"{source}, line {error.args[1][0]}: {error.args[0]}") from error
    for statement in statements:
        where = f"{source}, line {statement.location.line_num}: "
        if isinstance(statement, config_parser.BlockDeclaration):
            continue  # its bindings follow one by one
        if not isinstance(statement, config_parser.BindingStatement):
            raise UserError(f"{where}import and include are not supported; give several --gin_file")
        if statement.scope:
            raise UserError(f"{where}{statement.scope}/: scopes are not supported")
        key = ".".join(filter(None, (statement.selector, statement.arg_name)))
        config_files.set_value(config, key, statement.value, where)
