"""What every command does around its work: read the flags, check the config, and turn a user's mistake into one line.

Exit codes: what the work returns, 2 for a mistake the user can mend, 130 after Ctrl-C. A defect keeps its traceback.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mmalign_jax import config as settings
from mmalign_jax import config_files, gin_adapter
from mmalign_jax.config import Config
from mmalign_jax.errors import UserError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run(main: Callable[[Config, Path], int | None]) -> NoReturn:
    """Runs a command that takes `--config` and `--workdir`. A file's `if __name__ == "__main__"` ends in this call.

    Settings come from the config file, then `--gin_file`, then `--gin_bindings`, then `--config.a.b=v`; the later wins.
    """
    define_flags(flags.FLAGS)
    _define(flags.FLAGS, flags.DEFINE_string, "workdir", None, "directory that receives everything; with the same one, a run goes on")
    _run(lambda: main(read_config(), read_workdir()), parse)


def run_with_config(main: Callable[[Config], int | None]) -> NoReturn:
    """Runs a command that takes `--config` and no `--workdir`; its own flags are defined in its file."""
    define_flags(flags.FLAGS)
    _run(lambda: main(read_config()), parse)


def run_plain(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command whose flags are all defined in its own file."""
    _run(main, parse_plain)


def define_flags(flag_values: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """Defines `--config`, `--gin_file` and `--gin_bindings`.

    Args:
      flag_values: where.
      argv: the command line, program name first, in which overrides of config fields are looked for; `sys.argv` when None.
    """
    _define(
        flag_values, config_flags.DEFINE_config_file, "config", None, "config file; --config.a.b=v overrides a field",
        lock_config=True, sys_argv=None if argv is None else list(argv),
    )  # fmt: skip
    _define(flag_values, flags.DEFINE_multi_string, "gin_file", [], "gin file that sets config fields, such as train.steps = 5")
    _define(flag_values, flags.DEFINE_multi_string, "gin_bindings", [], "one gin binding, such as 'train.steps = 5'")


def parse(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Parses a command line, program name first, into `flag_values`.

    Raises:
      UserError: an unknown flag or config field, a value that cannot be read, or an argument that is no flag.
    """
    _check_config_arguments(argv)
    parse_plain(argv, flag_values)


def parse_plain(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """As `parse`, for a command whose `--config`, if it has one, is a flag like any other."""
    try:
        rest = flag_values(list(argv))
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; every setting is a flag, --name=value")


def read_config(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """The checked config of parsed flags.

    Raises:
      UserError: no `--config`, or a setting is unknown or out of range.
    """
    values: ConfigDict | None = flag_values.config
    if values is None:
        raise UserError("--config: give a config file, such as --config configs/quickstart.py")
    gin_adapter.apply(values, flag_values.gin_file, flag_values.gin_bindings)
    for key, value in flag_values["config"].override_values.items():
        config_files.set_value(values, key, value)  # again, because the command line stands above gin
    return settings.from_mapping(values)


def read_workdir(flag_values: flags.FlagValues = flags.FLAGS) -> Path:
    """The absolute path that `--workdir` names. Raises UserError when it is not given or is a file."""
    if not flag_values.workdir:
        raise UserError("--workdir: give the directory that receives the run, such as --workdir runs/first")
    workdir = Path(flag_values.workdir).expanduser().resolve()
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir: {workdir} is a file")
    return workdir


def _run(body: Callable[[], int | None], parser: Callable[[Sequence[str]], None]) -> NoReturn:
    """Parses the flags and runs the body under absl's start-up (help, logging, fault handler)."""

    def quietly(_: Sequence[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries tell every step of theirs at INFO
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # such as that torch is missing, which nothing here needs
        return body()

    try:
        app.run(quietly, flags_parser=parser)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _define(flag_values, definer, name, default, text, **options) -> None:
    definer(name, default, text, flag_values=flag_values, **options)
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values[name])  # so that --help of the command shows it


def _check_config_arguments(argv: Sequence[str]) -> None:
    """Names a missing file or an unknown field before absl sees the command line: its own errors do neither."""
    arguments = list(argv[1:])
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    path = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if match := re.match(r"--?config(=|$)", argument):
            path = argument[match.end() :] if match[1] else following
    if path is None:
        return
    values = config_files.load(path)
    for argument in arguments:
        if match := re.match(r"--?(no)?config\.([^=]*)", argument):
            config_files.check_key(values, match[2])
