"""Every command that README.md shows exists: its script, its config file, and every flag with its value."""

import json
import re
import shlex
import tomllib

import pytest
from helpers.commands import ROOT, launch

from mmalign_jax import config_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What a reader puts in the place of a capital letter
STANDS_FOR = {"N": "1", "T": "v5e:8x8"}
CONFIG_OF = {"launch/make_pairs.py": "configs/pairs/bdhs.py", "launch/aot_check.py": "configs/llava15_7b_dpo.py"}

# Runs each command up to the point where its work would begin: flags are parsed, and config and workdir are read, as in earnest.
# Every command gets a copy of one process, because imports are what takes long.
UP_TO_THE_WORK = """
import json, os, runpy, sys, tempfile, traceback
from mmalign_jax import cli, pipeline
run, run_with_config, run_plain = cli.run, cli.run_with_config, cli.run_plain
cli.run = lambda main: run(lambda config, workdir: print("ready"))
cli.run_with_config = lambda main: run_with_config(lambda config: print("ready"))
cli.run_plain = lambda main: run_plain(lambda: print("ready"))

def child(words, said):
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    sys.argv, code = words, 1
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)

outcomes = []
for words in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as said:
        process = os.fork()
        if process == 0:
            child(words, said)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        said.seek(0)
        outcomes.append((code, said.read()))
print(json.dumps(outcomes))
"""


def commands():
    """Word lists of the commands in bash blocks and in the table of commands."""
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(command) for line in lines for command in line.split("&&")]
    found = [words[1:] for words in found if words[:1] == ["python"] and words[1].startswith("launch/")]
    for quoted in re.findall(r"`(launch/\w+\.py [^`]*)`", README):
        script, *words = quoted.replace("[", " ").replace("]", " ").split()
        standing = STANDS_FOR | {"F": CONFIG_OF.get(script, "configs/base.py")}
        found.append([script, *(standing.get(word, word) for word in words)])
    return found


def test_the_commands_are_found():
    shown = {words[0] for words in commands()}
    assert shown == {f"launch/{file.name}" for file in (ROOT / "launch").glob("*.py")}


def test_the_commands_are_understood(tmp_path):
    given = [[str(tmp_path) if word == "D" else word for word in words] for words in commands()]
    done = launch("-W", "ignore", "-c", UP_TO_THE_WORK, json.dumps([*given, ["launch/train.py", "--config.train.stpes=1"]]))
    assert done.returncode == 0, done.stderr
    *outcomes, wrong = json.loads(done.stdout)
    for words, outcome in zip(given, outcomes, strict=True):
        assert outcome == [0, "ready\n"], words
    assert wrong[0] == 2  # what is not understood would show


def test_paths_exist():
    named = set(re.findall(r"\b(?:configs|launch|tests|mmalign_jax)/[\w/.]*\w", README))
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_settings_exist():
    base = config_files.load(ROOT / "configs" / "base.py")
    named = set(re.findall(r"--config\.([\w.]+)", README)) | set(re.findall(rf"`((?:{'|'.join(base)})\.\w+)`", README))
    assert len(named) >= 5
    for key in named - {"a.b", "report.html"}:  # no settings
        config_files.check_key(base, key)


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"\.\[(\w+)\]", README)) | set(re.findall(r"extra `(\w+)`", README))
    assert extras and extras <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("marker", ["quickstart-command", "test-command"])
def test_the_two_commands_stand_where_scripts_look_for_them(marker):
    found = re.findall(rf"^<!-- {marker} -->\n```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(found) == 1 and found[0].startswith("pip install -e ")


def test_nothing_is_left_to_fill_in():
    assert "PLACEHOLDER" not in (ROOT / "README.md").read_text(encoding="utf-8")
