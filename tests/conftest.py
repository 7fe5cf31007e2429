"""Settings that every test module relies on, made before JAX picks its backend."""

import hypothesis
import jax

# Tests of sharding need several devices; all others run on the first of them.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# The same examples at every run, and no failure because a machine was busy.
hypothesis.settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")
