import pytest

from mmalign_jax import files
from mmalign_jax.errors import DataError, UserError


def test_json_comes_back_and_the_old_file_stays_when_writing_fails(tmp_path):
    file = tmp_path / "a.json"
    files.write_json(file, {"a": [1, None, "ü"]})
    assert files.read_json(file) == {"a": [1, None, "ü"]}
    with pytest.raises(TypeError):
        files.write_json(file, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        files.replace_text(file, "\ud800")
    assert files.read_json(file) == {"a": [1, None, "ü"]}


def test_what_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(UserError, match="a.json: no such file"):
        files.read_json(file)
    for content in (b'{"a": ', b"\xff"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="a.json: damaged, .* Make it again."):
            files.read_json(file, "Make it again.")
