"""Programs that train real networks with backmatch_optax."""
