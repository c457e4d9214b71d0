"""The evaluation of the PagedAttention paper (Kwon et al., SOSP 2023), simulated: `python -m benchmarks.paper`."""
