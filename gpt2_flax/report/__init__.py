"""A page about runs: curves, samples, config, data and checkpoints in one HTML file. Nothing here imports jax."""
