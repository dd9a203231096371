"""Config files: Python files with a `get_config()` that returns a locked ConfigDict, as every command takes them.

A config file starts from another one and changes it. It names that file by its place, so that it works from any directory, without
a change of `sys.path`:

    from pathlib import Path

    from mmalign_jax import config_files

    def get_config():
        config = config_files.load(Path(__file__).with_name("base.py"))
        config.train.steps = 200
        return config
"""

import difflib
import importlib.util
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from mmalign_jax.errors import UserError

# What a slip of the pen in a config file raises. Anything else is a defect of what the file calls, and keeps its traceback.
_SLIPS = (SyntaxError, ImportError, NameError, AttributeError, LookupError, TypeError, ValueError)


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Runs a config file and sets the overrides, a mapping of dotted keys to values such as `{"train.steps": 5}`.

    The result is locked: fields can be set, not added.

    Raises:
      UserError: no such file, an error in it (with its line), or an unknown key or wrong type among the overrides.
    """
    module = load_module(path)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        if callable(getattr(module, "objective", None)):
            name = Path(path).stem
            raise UserError(f"{path}: defines an objective; give a config that trains, and --config.objective.name={name}")
        raise UserError(f"{path}: a config file defines get_config()")
    try:
        config = get_config()
    except _SLIPS as error:
        raise _slip(path, error) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() must return an ml_collections.ConfigDict, got {type(config).__name__}")
    config.lock()
    for key, value in (overrides or {}).items():
        set_value(config, key, value)
    return config


def load_module(path: str | Path) -> ModuleType:
    """Runs a Python file as a module that no other import can see.

    Raises:
      UserError: no such file, or an error in it (with its line).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    if path.suffix != ".py":
        raise UserError(f"{path}: a config file ends in .py")
    spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except _SLIPS as error:
        raise _slip(path, error) from error
    return module


def keys(config: ConfigDict) -> Iterator[str]:
    """The dotted names of all fields, groups left out."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from (f"{key}.{inner}" for inner in keys(value))
        else:
            yield key


def check_key(config: ConfigDict, key: str, source: str = "") -> None:
    """Checks that a dotted key names a field of the config.

    Args:
      config: where the key should be.
      key: such as "train.steps".
      source: what is put before the message, such as a file and a line.

    Raises:
      UserError: it does not; the message names the key and the nearest known one.
    """
    known = list(keys(config))
    if key in known:
        return
    inside = [name for name in known if name.startswith(key + ".")]
    if inside:
        raise UserError(f"{source}config.{key}: is a group of settings; set one of {', '.join('config.' + name for name in inside)}")
    match = difflib.get_close_matches(key, known, n=1) or [name for name in known if name.split(".")[-1] == key.split(".")[-1]][:1]
    hint = f" Did you mean config.{match[0]}?" if match else f" The groups are {', '.join(config)}."
    raise UserError(f"{source}config.{key}: no such setting.{hint}")


def set_value(config: ConfigDict, key: str, value: Any, source: str = "") -> None:
    """Sets the field that a dotted key names; arguments and errors as for `check_key`, and a UserError for a wrong type."""
    check_key(config, key, source)
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    try:
        config[name] = value
    except TypeError as error:
        wanted = config.get_type(name).__name__
        raise UserError(f"{source}config.{key}: expected {wanted}, got {value!r}") from error


def _slip(path: str | Path, error: Exception) -> UserError:
    if isinstance(error, SyntaxError):
        return UserError(f"{error.filename or path}, line {error.lineno}: {error.msg}")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(path)]
    where = f"{path}, line {frames[-1].lineno}: {frames[-1].line}: " if frames else f"{path}: "
    # a locked ConfigDict lists its whole content behind this phrase
    problem = " ".join(str(error).split(" Other fields present")[0].strip("'\" ").split())
    return UserError(f"{where}{problem or type(error).__name__}")
