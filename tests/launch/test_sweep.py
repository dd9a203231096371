import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmalign_jax import config, config_files
from mmalign_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "sweep.py"


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("launch_sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "sweep_file.py"
    path.write_text(f"base = {str(ROOT / 'configs' / 'base.py')!r}\ndef sweep():\n    {body}\n")
    return path


def test_one_run_for_each_override(sweep, tmp_path):
    values = "{'objective.beta': b, 'model.freeze': ('decoder',), 'train.seed': s}"
    path = write(tmp_path, f"yield from ({values} for b in (.1, .2) for s in (0, 1))")
    runs = sweep.expand(path, tmp_path / "runs")
    assert len({run.name for run in runs}) == 4
    words = shlex.split(shlex.join(runs[0].argv("python")))
    assert words[0] == "python" and words[1].endswith("train.py") and words[-2] == "--workdir"
    assert Path(words[-1]) == tmp_path / "runs" / runs[0].name
    assert "--config.objective.beta=0.1" in words and "--config.model.freeze=('decoder',)" in words


def test_names_are_stable_safe_and_apart(sweep):
    name = sweep.run_name({"objective.beta": 0.1, "data.path": "../a b/*c"})
    assert name == sweep.run_name({"data.path": "../a b/*c", "objective.beta": 0.1})
    assert name.startswith("path_.._a_b_c-beta_0.1-") and set("/ *") & set(name) == set()
    long = [sweep.run_name({"data.path": "x" * 300 + end}) for end in "ab"]
    assert len(set(long)) == 2 and all(len(one) < 120 for one in long)
    assert sweep.run_name({"train.seed": 1}) != sweep.run_name({"scenes.seed": 1})
    assert sweep.run_name({"data.path": "A"}).lower() != sweep.run_name({"data.path": "a"})
    assert sweep.run_name({"data.path": ".."}) not in ("", ".", "..") and sweep.run_name({}).startswith("base-")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield {'train.steps': 5}; yield {'train.stpes': 5}", r"run 1: config\.train\.stpes: no such setting\."),
        ("yield {'train.steps': 0}", r"run 0: config\.train\.steps: 0 is out of range"),
        ("yield {'objective.name': 'dpo', 'objective.gamma': 1.0}", r"run 0: config\.objective\.gamma: dpo has no such setting"),
        ("yield {'train.seed': 1}; yield {'train.seed': 1}", "run 1: .* repeats run 0"),
        ("yield {'objective.beta': None}", r"run 0: config\.objective\.beta: a command line cannot say None"),
        ("yield 3", "run 0: sweep.. yields mappings"),
        ("yield from ()", "yields no run"),
    ],
)
def test_errors_name_run_and_key_before_anything_runs(sweep, tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        sweep.expand(write(tmp_path, body), tmp_path)


def test_a_file_that_is_no_sweep(sweep):
    with pytest.raises(UserError, match="a sweep file defines base"):
        sweep.expand(ROOT / "configs" / "base.py", "runs")


def test_the_example_is_a_valid_sweep(sweep):
    assert len(sweep.expand(ROOT / "configs" / "sweeps" / "beta.py", "runs")) == 9


@pytest.mark.parametrize(("keep_going", "last"), [(False, "not run"), (True, "ok")])
def test_execute_stops_at_the_first_failure_or_goes_on(sweep, capfd, tmp_path, keep_going, last):
    runs = [(name, [sys.executable, "-c", f"raise SystemExit({code})"]) for name, code in zip("abc", (0, 3, 0), strict=True)]
    assert sweep.execute(runs, tmp_path, keep_going) == 1
    summary = capfd.readouterr().out.split("Sweep:\n")[1].splitlines()
    assert summary == [f"  {name}: {state}" for name, state in zip("abc", ["ok", "failed with exit code 3", last], strict=True)]
    assert sweep.execute(runs[:1], tmp_path, keep_going) == 0


def test_two_at_a_time_write_to_files_of_their_own(sweep, capfd, tmp_path):
    """The first two end only when both have started; the third must not start before one of them has ended."""
    meets = (
        "import pathlib, sys, time; me, other = map(pathlib.Path, sys.argv[1:]); me.touch()\n"
        "while not other.exists(): time.sleep(0.01)\nprint('met', me.name); me.with_suffix('.done').touch()"
    )
    pair = [str(tmp_path / name) for name in ("first", "second")]
    last = "import pathlib, sys; print(any(pathlib.Path(sys.argv[1]).glob('*.done')))"
    python = [sys.executable, "-c"]
    runs = [("a", [*python, meets, *pair]), ("b", [*python, meets, *pair[::-1]]), ("c", [*python, last, str(tmp_path)])]
    assert sweep.execute(runs, tmp_path, False, jobs=2) == 0
    assert [(tmp_path / name / "output.txt").read_text() for name in "abc"] == ["met first\n", "met second\n", "True\n"]
    assert "met first" not in capfd.readouterr().out


def test_ctrl_c_lets_the_run_save_and_stops_the_sweep(tmp_path):
    saves = (
        "import sys, time\ntry:\n    print('started', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1); open(sys.argv[1], 'w').close()"
    )
    body = (
        # what a background job starts is deaf to SIGINT
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import importlib.util, sys\nspec = importlib.util.spec_from_file_location('launch_sweep', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['launch_sweep'] = module; spec.loader.exec_module(module)\n"
        f"sys.exit(module.execute([(name, [sys.executable, '-c', {saves!r}, name]) for name in 'ab'], None, True))"
    )
    arguments = [sys.executable, "-c", body, str(SCRIPT)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True)
    while process.stdout.readline() not in ("started\n", ""):
        pass
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert out.splitlines()[-2:] == ["  a: interrupted", "  b: not run"]


def test_printed_commands_parse_to_the_configs_of_the_sweep(tmp_path):
    path = write(tmp_path, "yield {'objective.beta': 1, 'eval.benchmarks': ('pope', 'chair'), 'eval.before': False}")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", str(path), "--workdir", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    arguments = shlex.split(line)[2:]
    body = "from mmalign_jax import cli, config\nimport json\ncli.run(lambda values, workdir: print(json.dumps(config.to_mapping(values))))"
    again = subprocess.run([sys.executable, "-c", body, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    overrides = {"objective.beta": 1.0, "eval.benchmarks": ("pope", "chair"), "eval.before": False}
    wanted = config.from_mapping(config_files.load(ROOT / "configs" / "base.py", overrides))
    assert config.from_mapping(json.loads(again.stdout)) == wanted
