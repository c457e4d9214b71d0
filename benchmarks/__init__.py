"""Run from the repository root: `python -m benchmarks.peers`, `python -m benchmarks.kernels`."""
