"""Which per-layer rule pays? A benchmark of networks drawn at random."""
