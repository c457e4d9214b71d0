"""TASKS and POOLINGS: what a model may be for, and how a text's hidden states become one vector."""

TASKS = ("auto", "generate", "embed", "classify", "score")
POOLINGS = ("mean", "cls", "last", "max", "mean_sqrt_len", "weighted_mean")
"""Over a text's n tokens: mean, first, last, maximum, sum / √n, and the mean weighted by 1 to n."""
