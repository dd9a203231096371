import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from mmalign_jax import cli
from mmalign_jax.errors import UserError

BASE = Path(__file__).resolve().parents[1] / "configs" / "base.py"

COMMAND = '''
"""A command for the tests."""
import sys, time
from mmalign_jax import cli
from mmalign_jax.errors import UserError

def main(config, workdir):
    print(config.train.steps, config.objective.hyperparameters.get("beta"), workdir.name, flush=True)
    match workdir.name:
        case "mistake": raise UserError("first line\\nsecond line")
        case "defect": raise ZeroDivisionError("a defect")
        case "wait": time.sleep(60)
    return 0 if workdir.name == "fine" else 5

if __name__ == "__main__":
    cli.run(main)
'''


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("command") / "command.py"
    path.write_text(COMMAND)
    return path


# What a shell starts in the background is deaf to SIGINT, and so is what that starts. The commands that are tested are not
HEARS_CTRL_C = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


def start(command: Path, *arguments: str) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HEARS_CTRL_C, str(command), *arguments], cwd=command.parent, env=env, **pipes)


def call(command: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(command, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def parsed(*arguments: str):
    argv = ["command", *arguments]
    values = flags.FlagValues()
    cli.define_flags(values, argv)
    cli.parse(argv, values)
    return cli.read_config(values)


def test_overrides_and_exit_code(command, tmp_path):
    code, out, err = call(command, f"--config={BASE}", f"--workdir={tmp_path}/fine", "--config.objective.beta=2", "--config.train.steps=4")
    assert (code, out.split()) == (0, ["4", "2.0", "fine"]), err
    assert call(command, "--config", str(BASE), "--workdir", f"{tmp_path}/other")[0] == 5


def test_a_mistake_is_one_line_and_a_defect_keeps_its_traceback(command, tmp_path):
    code, _, err = call(command, "--config", str(BASE), f"--workdir={tmp_path}/mistake")
    assert (code, err) == (2, "error: first line second line\n")
    code, _, err = call(command, "--config", str(BASE), f"--workdir={tmp_path}/fine", "--config.objectve.beta=1")
    assert (code, err) == (2, "error: config.objectve.beta: no such setting. Did you mean config.objective.beta?\n")
    code, _, err = call(command, "--config", str(BASE), f"--workdir={tmp_path}/defect")
    assert code == 1 and "Traceback" in err and "ZeroDivisionError: a defect" in err


def test_interrupt_ends_without_a_traceback(command, tmp_path):
    process = start(command, "--config", str(BASE), f"--workdir={tmp_path}/wait")
    assert process.stdout.readline().strip().endswith("wait")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: give a config file"),
        (["--config", "none.py"], "none.py: no such config file"),
        (["--config=none.py", "--config.train.steps=1"], "none.py: no such config file"),
        (["--config", str(BASE), "--config.train.steps=abc"], "config.train.steps=abc"),
        (["--config", str(BASE), "--config.train.steps=0"], "config.train.steps: 0 is out of range"),
        (["--config", str(BASE), "--config.train.stpes", "3"], r"config.train.stpes: no such setting. Did you mean config.train.steps\?"),
        (["--config", str(BASE), "--noconfig.eval.befor"], r"config.eval.befor: no such setting. Did you mean config.eval.before\?"),
        (["--config", str(BASE), "--config.train=3"], "config.train: is a group of settings"),
        (["--config.train.steps=3", "--config", str(BASE)], "--config.train.steps=3 in argv before"),
        (["--config", str(BASE), "--workdr=x"], "workdr"),
        (["--config", str(BASE), "steps=3"], "unexpected argument 'steps=3'"),
        (["--config", str(BASE), "--gin_bindings=train.stpes=3"], "config.train.stpes: no such setting"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # ml_collections reads config files with it
def test_errors_are_one_line_and_name_the_flag(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        parsed(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")
def test_the_command_line_stands_above_gin_and_gin_above_the_file(tmp_path):
    file = tmp_path / "a.gin"
    file.write_text("train.steps = 11\ntrain.seed = 12\ntrain.batch_size = 4\n")
    arguments = [f"--gin_file={file}", "--gin_bindings=train.seed = 22", "--gin_bindings=train.log_every = 23"]
    out = parsed("--config", str(BASE), *arguments, "--config.train.steps=31", "--config.eval.benchmarks=pope", "--noconfig.eval.before")
    assert (out.train.steps, out.train.seed, out.train.log_every, out.train.batch_size) == (31, 22, 23, 4)
    assert out.eval.benchmarks == ("pope",) and out.eval.before is False
