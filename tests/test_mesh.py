import pytest

from mmalign_jax import mesh


@pytest.mark.parametrize(
    "setting, platform, dtype",
    [
        ("auto", "cpu", "float32"),
        ("auto", "tpu", "bfloat16"),
        ("auto", "gpu", "bfloat16"),
        ("float32", "tpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_compute_dtype(setting, platform, dtype):
    assert mesh.compute_dtype(setting, platform) == dtype
