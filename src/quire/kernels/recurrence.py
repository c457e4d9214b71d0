"""The operations of recurrent layers in plain PyTorch, for any device: one batched step for sequences of one token, and
chunks of products for longer ones. `quire.kernels.reference` specifies what each computes.

No operation waits for the device, and none loops over tokens. Sums and states are float32 (or float64, for tests).
T new tokens, B sequences, C channels, G key heads, H heads, K key_dim, V value_dim; N chunks of L places.
"""

import torch
from torch import Tensor

from quire.kernels.interface import StateLayer
from quire.kernels.recurrent_plan import Chunks, RecurrentPlan


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: StateLayer, plan: RecurrentPlan) -> Tensor:
    """x [T, C], weight [C, W], bias [C] -> [T, C]."""
    rows, (num_channels, width) = plan.conv, weight.shape
    num_inputs = len(x) + len(rows.before)
    inputs = x.new_empty((num_inputs, num_channels))
    inputs[rows.tokens] = x
    inputs[rows.before] = state.conv[plan.slots].view(-1, num_channels).to(x.dtype)
    last = num_inputs - width + 1
    sums = inputs[:last] * weight[:, 0]
    for offset in range(1, width):
        sums.addcmul_(inputs[offset : offset + last], weight[:, offset])
    shape = (-1, width - 1, num_channels)
    state.conv[plan.slots] = inputs[rows.after].view(shape).to(state.conv.dtype)
    if len(rows.saved):
        state.conv[plan.saves[:, 2]] = inputs[rows.saved].view(shape).to(state.conv.dtype)
    out = sums[rows.tokens - (width - 1)]
    return out if bias is None else out.add_(bias)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, state: StateLayer, plan: RecurrentPlan
) -> Tensor:
    """q, k [T, G, K], v [T, H, V], log_decay, beta [T, H] -> [T, H, V]."""
    out = torch.empty_like(v)
    states = state.recurrent
    for step in plan.steps:
        rows = step.rows
        betas = None if beta is None else beta[rows]
        out[rows] = _step(q[rows], k[rows], v[rows], log_decay[rows], betas, states, step.slots)
        if len(step.saved):
            states[step.save_slots] = states[step.slots[step.saved]]
    if plan.chunks is not None:
        chunks = plan.chunks
        padding = chunks.padding[..., None]
        betas = None if beta is None else beta[chunks.rows].masked_fill_(padding, 0.0)
        # What stands in the padding is another sequence's: it must not even be multiplied by zero.
        result = _chunks(
            q[chunks.rows],
            k[chunks.rows].masked_fill_(padding[..., None], 0.0),
            v[chunks.rows].masked_fill_(padding[..., None], 0.0),
            log_decay[chunks.rows].masked_fill_(padding, 0.0),
            betas,
            state.recurrent,
            chunks,
        )
        out[chunks.tokens] = result.flatten(0, 1)[chunks.places]
    return out


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, states: Tensor, slots: Tensor
) -> Tensor:
    """One token of each of B sequences: q, k [B, G, K], v [B, H, V] -> [B, H, V]."""
    batch, num_heads, value_dim = v.shape
    group, key_dim = num_heads // k.shape[1], k.shape[2]
    q = q.repeat_interleave(group, dim=1).view(-1, 1, key_dim)
    k = k.repeat_interleave(group, dim=1).view(-1, 1, key_dim)
    s = states[slots].to(v.dtype).view(-1, key_dim, value_dim)
    s *= log_decay.exp().view(-1, 1, 1)
    new = v.reshape(-1, 1, value_dim)
    if beta is not None:
        new = (new - torch.bmm(k, s)) * beta.reshape(-1, 1, 1)
    s.baddbmm_(k.transpose(1, 2), new)
    states[slots] = s.view(batch, num_heads, key_dim, value_dim).to(states.dtype)
    return torch.bmm(q, s).view(batch, num_heads, value_dim)


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, states: Tensor, chunks: Chunks
) -> Tensor:
    """q, k [N, L, G, K], v [N, L, H, V], log_decay, beta [N, L, H] -> [N, L, H, V].

    Inside a chunk the tokens' effects on each other are products; the state passes from chunk to chunk. Token i sees
    what token j wrote times exp(g_i - g_j), where g are the sums of log_decay. With `beta` each token first removes
    what its key already reads, also what earlier tokens of the chunk wrote: a triangular system.
    """
    group = v.shape[2] // k.shape[2]
    q, k = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (q, k))  # [N, H, L, K]
    v = v.transpose(1, 2)
    g = log_decay.transpose(1, 2).cumsum(-1)  # [N, H, L]
    fades = (g.unsqueeze(-1) - g.unsqueeze(-2)).tril_().exp_().tril_()
    grown = g.exp().unsqueeze(-1)
    read = None
    if beta is not None:
        beta = beta.transpose(1, 2).unsqueeze(-1)
        # The diagonal is taken as 1.
        system = torch.matmul(k * beta, k.transpose(-1, -2)).mul_(fades)
        sides = torch.cat((v * beta, k * (beta * grown)), dim=-1)
        solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
        v, read = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(fades)
    q = q * grown
    k = (k * (g[..., -1:] - g).exp().unsqueeze(-1)).transpose(-1, -2)
    kept = g[..., -1].exp()[..., None, None]
    out = torch.empty_like(v)
    for each in chunks.rounds:
        part = slice(each.first, each.end)
        s = states[each.slots].to(v.dtype)
        new = v[part] if read is None else v[part] - torch.matmul(read[part], s)
        out[part] = torch.matmul(q[part], s).add_(torch.matmul(scores[part], new))
        s = s.mul_(kept[part]).add_(torch.matmul(k[part], new)).to(states.dtype)
        states[each.slots] = s
        if len(each.saved):
            states[each.save_slots] = s[each.saved]
    return out.transpose(1, 2)
