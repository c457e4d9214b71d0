"""Least time of a workload on this machine: its operations and bytes at the rates of `benchmarks.ceilings`.

A prefix that several prompts share is computed once. The last layer is computed only for sampled tokens. Matrices and
attention run at the rate of the weights' format. Every step reads all weights, so the longest output sets a second
limit. Reading KV is not counted.
"""

from benchmarks.peers.workloads import Workload
from quire.simulation.model_shapes import ModelShape

FORMATS = {"float32": ("fp32_gflops", 4), "bfloat16": ("bf16_gflops", 2), "int8": ("int8_gops", 1)}
"""Format of the weights → the ceiling of its products, and bytes per weight."""


def least_seconds(model: ModelShape, workload: Workload, ceilings: dict[str, float], weights: str) -> float:
    """Least seconds of a workload, for any engine with weights of that format."""
    rate, num_bytes = FORMATS[weights]
    num_steps = max(request.num_output_tokens for request in workload.requests)
    read = num_steps * num_bytes * (model.spec.layer_parameters + model.spec.num_head_parameters)
    return max(num_operations(model, workload) / ceilings[rate], read / ceilings["read_gb_per_s"]) / 1e9


def num_operations(model: ModelShape, workload: Workload) -> float:
    """Multiplications and additions."""
    num_samples = workload.beam_width or workload.n
    computed = prompt_contexts(workload)
    sampled = []
    for request in workload.requests:
        length = len(request.prompt_token_ids)
        sampled.append(length)
        # The last token of an output is not computed.
        decoded = num_samples * list(range(length + 1, length + request.num_output_tokens))
        computed += decoded
        sampled += decoded
    spec = model.spec
    per_token = 2 * spec.active_layer_parameters / spec.num_layers
    per_key = spec.operations_per_pair / spec.num_layers
    lower_layers = (spec.num_layers - 1) * (per_token * len(computed) + per_key * sum(computed))
    last_layer = per_token * len(sampled) + per_key * sum(sampled)
    return lower_layers + last_layer + 2 * spec.num_head_parameters * len(sampled)


def prompt_contexts(workload: Workload) -> list[int]:
    """The number of keys of each prompt token that must be computed."""
    contexts, followers = [], dict[tuple[int, int], int]()
    for request in workload.requests:
        node = 0  # a node of the tree of all prompts
        for context, token in enumerate(request.prompt_token_ids, start=1):
            if (node, token) not in followers:
                followers[node, token] = len(followers) + 1
                contexts.append(context)
            node = followers[node, token]
    return contexts
