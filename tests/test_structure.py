"""The house rules that a reader relies on, checked on the source itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmalign_jax"
SOURCES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
COMMANDS = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted((ROOT / "launch").glob("*.py"))}

FORBIDDEN = {"torch", "tensorflow", "trl", "peft", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FLOOR = {"types", "mesh", "errors", "files", "mentions"}
SETTINGS = {"config", "config_files"}
SIDE = {"data", "hf", "scenes", "report"}
WITH_TORCH, ITS_READER = "mmalign_jax/verify/theirs.py", "mmalign_jax/verify/compare.py"
# processes of their own, which nothing imports
OTHER_SIDES = {"mmalign_jax/benchmark/bdhs_transformers.py": {"torch"}, "mmalign_jax/benchmark/step_trl.py": {"torch", "trl"}}

# What each room may import of the package, itself and the ground floor apart.
MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "files": set(),
    "mesh": set(),
    "mentions": set(),
    "config": {"losses", "config_checks"},
    "config_checks": {"config"},
    "config_files": set(),
    "gin_adapter": SETTINGS,
    "cli": SETTINGS | {"gin_adapter"},
    "losses": set(),
    "models": set(),
    "sampling": {"models"},
    "report": {"config"},
    "hf": {"config", "models"},
    "scenes": {"config", "hf"},
    "data": {"config", "hf", "scenes"},
    "pairs": {"config", "models", "sampling", "losses"} | SIDE,
    "evaluation": {"config", "models", "sampling", "pairs"} | SIDE,
    "verify": {"config", "models", "sampling", "losses", "data", "hf"},
    "benchmark": {"config", "models", "losses", "sampling", "pairs", "training"} | SIDE,
    "run_files": {"config"},
    "run_export": {"config", "models", "pairs", "losses", "evaluation", "training", "run_files"} | SIDE,
    "pipeline": {"config", "models", "sampling", "pairs", "losses", "evaluation", "training", "run_files", "run_export"} | SIDE,
    "rounds": {"config", "pipeline", "run_files", "report"},
    "training": {"config", "models", "sampling", "pairs", "losses", "evaluation"} | SIDE,
}


def imports(tree: ast.AST) -> set[str]:
    """Full names of what a file imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: str) -> str:
    return path.removeprefix("mmalign_jax/").split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES)
def test_arrows(path):
    here = room(path)
    if here == "__init__":
        assert not [name for name in imports(SOURCES[path]) if name.startswith("mmalign_jax")]
        return
    allowed = MAY_IMPORT[here] | FLOOR | {here}
    reached = {name.split(".")[1] for name in imports(SOURCES[path]) if name.startswith("mmalign_jax.")}
    assert reached <= allowed, f"{path} imports {sorted(reached - allowed)}; {here} may import {sorted(allowed)}"


@pytest.mark.parametrize("path", SOURCES)
def test_forbidden_imports(path):
    names = imports(SOURCES[path])
    assert not {name.split(".")[0] for name in names} & (FORBIDDEN - OTHER_SIDES.get(path, {"torch"} if path == WITH_TORCH else set()))
    flax = {name for name in names if name.split(".")[0] == "flax"}
    if room(path) == "models":
        assert all(name == "flax.linen" or name.startswith("flax.linen.") for name in flax), flax
    else:
        assert not flax, f"{path}: only models/ imports flax"


def test_only_the_comparison_loads_torch_and_only_when_it_runs():
    module = WITH_TORCH.removesuffix(".py").replace("/", ".")
    loads = lambda tree: any(name == module or name.startswith(module + ".") for name in imports(tree))  # noqa: E731
    assert {path for path, tree in (SOURCES | COMMANDS).items() if loads(tree)} == {ITS_READER}
    others = {path.removesuffix(".py").replace("/", ".") for path in OTHER_SIDES}
    assert not [path for path, tree in (SOURCES | COMMANDS).items() if others & set(imports(tree))]
    on_import = [node for node in SOURCES[ITS_READER].body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not any(map(loads, on_import))


@pytest.mark.parametrize("path", SOURCES | COMMANDS)
def test_files_are_short(path):
    assert len((ROOT / path).read_text().splitlines()) < 500


@pytest.mark.parametrize("path", SOURCES | COMMANDS)
def test_no_code_or_pickle_from_data(path):
    """No eval, no code of a checkpoint, no pickled arrays."""
    for node in ast.walk((SOURCES | COMMANDS)[path]):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            is_builtin = isinstance(node.func, ast.Name)
            assert not (is_builtin and name in ("eval", "exec")), f"{path}, line {node.lineno}: {name}"
            for keyword in node.keywords:
                assert keyword.arg not in ("trust_remote_code", "allow_pickle") or (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ), f"{path}, line {node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("path", SOURCES | COMMANDS)
def test_no_broad_except(path):
    for node in ast.walk((SOURCES | COMMANDS)[path]):
        if isinstance(node, ast.ExceptHandler):
            names = {getattr(item, "id", "") for item in getattr(node.type, "elts", [node.type])}
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert raises_again or (node.type is not None and not names & {"Exception", "BaseException"}), f"{path}, line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES | COMMANDS)
def test_public_code_of_some_length_has_a_docstring(path):
    tree = (SOURCES | COMMANDS)[path]
    assert ast.get_docstring(tree) or not tree.body, f"{path}: the file says nothing of itself"
    missing = []
    obvious = lambda node: node.name == "setup" or _is_record(node)  # flax's own method; fields that carry their help  # noqa: E731
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    public += [
        node for parent in public if isinstance(parent, ast.ClassDef) for node in parent.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]  # fmt: skip
    for node in public:
        if node.end_lineno - node.lineno + 1 > 12 and not ast.get_docstring(node) and not obvious(node):
            missing.append(f"{path}, line {node.lineno}: {node.name}")
    assert not missing, missing


def _is_record(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and all(isinstance(item, ast.AnnAssign) for item in node.body)


@pytest.mark.parametrize("path", SOURCES | COMMANDS)
def test_nothing_is_left_undone(path):
    text = (ROOT / path).read_text()
    assert not [word for word in ("TODO", "FIXME", "XXX", "raise NotImplementedError") if word in text]


def test_ci_reads_the_command_from_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- test-command -->" in script and "set -euo pipefail" in script
    marked = (ROOT / "README.md").read_text().split("<!-- test-command -->")
    assert len(marked) == 2, "README.md holds the marker once"
    block = marked[1].split("```bash\n")[1].split("```")[0]
    assert "[test]" in block and "pytest" in block
