"""Settings that every test module relies on, made before JAX picks its backend."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Threads of XLA's pool on CPU. With no more of them than devices, an all-reduce can
# wait for ever for threads that wait for its result, where programs run without jit.
os.environ["NPROC"] = "32"
# Tests of sharding need several devices; all others run on the first of them.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Set by CI for one small part of the tests: everything as a user's XLA compiles it, and
# examples that no run before has seen. Give `--hypothesis-seed` too, to know the seed.
FRESH = os.environ.get("TESTS_FRESH") == "1"

# Else the same examples at every run; and no failure because a machine was busy.
hypothesis.settings.register_profile(
    "tests",
    derandomize=not FRESH,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Compiles in less time, which is most of what the tests take.

    XLA leaves out what makes programs fast, and what takes long is kept, since many
    tests compile the same network. Programs that tests start do so too, through the
    environment.
    """
    settings: dict[str, object] = {"jax_disable_most_optimizations": not FRESH}
    if config.pluginmanager.has_plugin("cacheprovider"):
        assert config.cache is not None
        settings["jax_compilation_cache_dir"] = str(config.cache.mkdir("jax"))
        settings["jax_persistent_cache_min_compile_time_secs"] = 0.3
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name, value in settings.items():
        jax.config.update(name, value)
        patch.setenv(name.upper(), str(value))


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """Frees what a module has traced and compiled: gigabytes, all looked at by `gc`."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimized() -> Iterator[None]:
    """For tests of what XLA makes of a program: all that a user's XLA does to it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", not FRESH)
