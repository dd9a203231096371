import pytest

from mmalign_jax.errors import UserError
from mmalign_jax.pairs.judge import Prompt
from mmalign_jax.pairs.judge.prompts import FIELDS, names


@pytest.mark.parametrize("name", names())
def test_the_packages_own_prompts(name):
    prompt = Prompt.load(name)
    values = {field: f"<{field}>" for field in FIELDS[prompt.kind]}
    text = prompt.fill(**values)
    judged = ("first", "second") if prompt.kind == "compare" else ("answer",)
    assert all(f"<{field}>" in text for field in ("question", *judged)) and "{" not in text


@pytest.mark.parametrize(
    ("name", "reply", "verdict"),
    [
        ("compare", "Because. [[A]]", "first"), ("compare", "[[A]] at first, but then [[B]]", "second"), ("compare", "[[c]]", "tie"),
        ("compare", "A is better", None), ("compare", "", None), ("compare", "[[D]]", None), ("sima", "[[2]]", "second"), ("sima", "[[3]]", None),
        ("score", "[[7]]", 7.0), ("score", "[[3]], or [[6.5]]", 6.5), ("score", "[[11]]", None), ("score", "seven", None),
    ],
)  # fmt: skip
def test_verdicts(name, reply, verdict):
    assert Prompt.load(name).read(reply) == verdict


GOOD = {"kind": '"score"', "text": '"{question} {answer}"', "verdict": "'(?P<score>\\d+)'"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": '"rank"'}, "a prompt has kind"), ({"text": "3"}, "a prompt has kind"), ({"text": '"{first}"'}, "{first} has no value"),
        ({"verdict": "'('"}, "no regular expression"), ({"verdict": "'[0-9]'"}, "named groups among score"),
        ({"verdict": "'(?P<tie>x)'"}, "named groups among score"), ({"scale": "[3, 3]"}, "two numbers that rise"), ({"txt": "1"}, "txt is nothing"),
        ({"kind": "score"}, "not TOML"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_prompt(tmp_path, changes, message):
    file = tmp_path / "mine.toml"
    file.write_text("\n".join(f"{key} = {value}" for key, value in (GOOD | changes).items()))
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        Prompt.load(str(file))


def test_prompts_by_path(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("\n".join(f"{key} = {value}" for key, value in (GOOD | {"scale": "[1, 5]"}).items()))
    prompt = Prompt.load(str(file))
    assert prompt.read("4") == 4.0 and prompt.read("6") is None and prompt.fill(question="?", answer="{question}", reference="") == "? {question}"
    with pytest.raises(UserError, match="no prompt of that name, and no file; the package has compare"):
        Prompt.load("nowhere")
