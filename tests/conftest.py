"""The whole run sees eight CPU devices and checks every array annotation of the package.

Both must happen before anything imports jax or the package.
"""

import os
import sys
from importlib.metadata import version

assert "mmalign_jax" not in sys.modules, "the package was imported before conftest.py"
os.environ["JAX_PLATFORMS"] = "cpu"  # tests that start commands hand this on
# Nearly all of the time of these tests is XLA compiling programs that run once or twice on tiny arrays; its older emitters compile them
# two to three times as fast. Also handed on. A version of XLA that does not know the flag would end the process.
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# By jax.config and not by XLA_FLAGS, so that the commands which tests start see one device, as a user does.
jax.config.update("jax_num_cpu_devices", 8)

# An int is welcome where a float is annotated. Constructors are not checked: jax rebuilds registered records from shapes, shardings
# and batch axes, which are no arrays of the annotated shape.
_STRATEGY = "beartype.BeartypeStrategy.O0 if x.__name__ == '__init__' else beartype.BeartypeStrategy.O1"
jaxtyping.install_import_hook("mmalign_jax", f"beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, strategy={_STRATEGY}))")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """XLA's optimisations are of no use to tiny arrays, and most of the time of tests that compile much. Files marked `optimised` have them."""
    quick = request.node.get_closest_marker("optimised") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
