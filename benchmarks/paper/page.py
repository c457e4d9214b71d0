"""docs/paper.md: simulated figures beside the paper's, table by table, with conclusions."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.paper.experiments import (
    ATTENTION_SLOWDOWN,
    NAMES,
    PANELS,
    PREFIXES,
    SECONDS,
    SEQUENCE_OVERHEAD,
    SHARING,
    STEP_OVERHEAD,
    THRESHOLD,
    TIERS,
    WMT_MEANS,
    Knee,
    Panel,
)

_FIG_2 = {
    "orca-max": (20.4, 13.3, 57.3, 8.9),
    "orca-pow2": (26.8, 17.9, 13.6, 41.6),
    "orca-oracle": (38.2, 25.2, 0.0, 36.6),
    "paged": (96.3, None, None, None),
}
_FIG_13 = {
    "sharegpt": {"orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62, "paged": 30.42},
    "alpaca": {"orca-max": 7.00, "orca-pow2": 43.24, "orca-oracle": 72.75, "paged": 132.44},
}
_FIG_15 = {"n": {2: 6.09, 4: 8.53, 6: 9.79}, "beam_width": {2: 37.56, 4: 53.13, 6: 55.16}}
_FIG_15_SHAREGPT = {"n": (16.2, 30.5), "beam_width": (44.3, 66.3)}
_FIG_16 = {80: 1.67, 341: 3.58}
_ORCAS = ("paged", "orca-oracle", "orca-pow2", "orca-max")
_RATIOS = {"orca-oracle": (1.7, 2.7), "orca-max": (2.7, 8.0), "fastertransformer": (None, 22.0)}
"""Section 6.2, ShareGPT: vLLM's sustained rate over that of others, minimum and maximum over three models."""


def write_page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    sections = [_opening(), *(write(results) for write in _SECTIONS.values()), _headlines(results), _missing()]
    return "\n\n".join(map(_wrapped, sections)) + "\n"


def write_section(name: str, results: dict[str, Any]) -> str:
    """One section of the page; `results` need only hold what it is made of."""
    return _wrapped(_SECTIONS[name](results))


def _wrapped(section: str) -> str:
    """Paragraphs at 120 columns; headings, tables, lists and pictures as they are."""
    paragraphs = section.split("\n\n")
    return "\n\n".join(
        text if text[0] in "#|!-" else textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)
        for text in paragraphs
    )


def _opening() -> str:
    return f"""# The paper, reproduced

Written by `make paper`; do not edit. The evaluation of *Efficient Memory Management for Large Language Model Serving
with PagedAttention* (Kwon et al., SOSP 2023) in simulation: Quire's own scheduler and block pool against a modelled
executor, and the paper's baselines by its definitions. Printed values are in parentheses.

**What is modelled.** A step takes the longer of reading the weights and multiplying with them, plus the longer of
reading KV and computing attention, plus an overhead. Rates are those of data sheets, of which 85 % of the bandwidth and
55 % of the matrix rate are taken to be reached. The overhead, {1000 * STEP_OVERHEAD:.1f} ms
a step and {1000 * SEQUENCE_OVERHEAD:.2f} ms for each sequence in it, is taken from two printed numbers (vLLM's batches
in Fig. 13, by Little's law) and is the same for every system. The paged attention kernel takes {ATTENTION_SLOWDOWN}
times as long as a contiguous one, as the paper measures. Prefix caching is off, as it was. Nothing else is fitted.

**What differs.** Quire is not the vLLM of 2023: prompts are computed in chunks among decoding sequences, and preemption
recomputes, never swaps. ShareGPT's lengths are real ones, drawn again so that their means are the paper's; Alpaca's are
synthetic, of a shape chosen by Fig. 13b's values for Orca (Pow2) and (Oracle), which are therefore no test. Requests
arrive for {SECONDS:g} s (paper: an hour, 15 minutes for 175B), so rates just above what a system sustains hurt less."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fig_2(rows: Sequence[dict[str, Any]]) -> str:
    kinds = ("token_states_pct", "reservation_pct", "internal_pct", "external_pct")
    body = []
    for row in rows:
        printed = _FIG_2[row["policy"]]
        cells = [
            f"{row[kind]:.1f}" + (f" ({value:.1f})" if value is not None else "")
            for kind, value in zip(kinds, printed, strict=True)
        ]
        body.append([NAMES[row["policy"]], *cells])
    paged = next(row for row in rows if row["policy"] == "paged")
    return f"""## Fig. 2: where KV memory goes

OPT-13B on one A100-40GB, 15,728 token slots, ShareGPT lengths, a queue that is always full; averages over time, in %.
Quire's are shares of the blocks it has taken; of the whole pool {paged["token_states_of_pool_pct"]:.1f} % hold tokens.

{_table(["", "token states", "reservation", "internal", "external and others"], body)}

![Fig. 2](paper/fig02-waste.svg)"""


def _knee_of(knees: Sequence[Knee], label: str, policy: str) -> float:
    return next(knee.rate for knee in knees if knee.panel.label == label and knee.policy == policy)


def _fig_12(knees: Sequence[Knee], freed: float) -> str:
    policies = ("paged", "orca-oracle", "orca-pow2", "orca-max", "fastertransformer")
    body = []
    for panel in PANELS:
        rates = {policy: _knee_of(knees, panel.label, policy) for policy in policies}
        cells = [f"{rates['paged']:.2f}"]
        cells += [f"{rates[policy]:.2f} · {rates['paged'] / rates[policy]:.2f}×" for policy in policies[1:]]
        body.append([f"({panel.label}) {panel.model}, {panel.trace.split('_')[0]}", *cells])
    verdicts = []
    for policy, (least, most) in _RATIOS.items():
        ratios = [_knee_of(knees, label, "paged") / _knee_of(knees, label, policy) for label in "abc"]
        printed = f"{least}×–{most}×" if least else f"up to {most:g}×"
        inside = [ratio for ratio in ratios if (least or 0) * 0.95 <= ratio <= most * 1.05]
        came_out = len(inside) == len(ratios) if least else max(ratios) > 0.8 * most
        verdicts.append(
            f"- over {NAMES[policy]}: {', '.join(f'{ratio:.2f}×' for ratio in ratios)} for 13B, 66B, 175B (printed "
            f"{printed}): {'comes out' if came_out else 'does not come out as printed'}."
        )
    alpaca = _knee_of(knees, "d", "paged") / _knee_of(knees, "d", "orca-oracle")
    most_kv = _knee_of(knees, "f", "paged") / _knee_of(knees, "f", "orca-oracle")
    verdict_f = "comes out" if most_kv < 1.2 else "does not come out: the lead is not small here"
    return f"""## Fig. 12: latency against rate

Mean normalised latency (end-to-end latency over output length) against the rate of Poisson arrivals. A rate counts as
sustained up to {THRESHOLD} s/token; the paper states no threshold. Found by bisection to 2 %. Requests per second, and
Quire's multiple of it:

{_table(["", "Quire", *(NAMES[policy] for policy in policies[1:])], body)}

![Fig. 12](paper/fig12-latency.svg)

ShareGPT, within 5 % of the printed bounds:

{chr(10).join(verdicts)}

OPT-175B has 264 GiB for KV, so that Orca's reservations bind little: the printed figure's own curve lies below 1.7×
there, too. Neither the limit of 256 sequences nor the overhead of each keeps Quire's lead small: with 1024 and none it
is {freed:.2f}×. To read the whole pool takes as long as to read the weights there, so that a batch twice as large is
far from twice the tokens.

The 8× over Orca (Max) and the 22× over FasterTransformer are the most of three models, and the curves of the printed
figure do not show the former at any threshold either; the multiple of FasterTransformer depends on the threshold most
of all, because its latency rises long before it breaks.

Alpaca, OPT-13B over Orca (Oracle): {alpaca:.2f}× (printed 1.3×).
OPT-175B on Alpaca, where memory is plenty and the lead is said to be small: {most_kv:.2f}×, {verdict_f}."""


def _fig_13(rows: Sequence[dict[str, Any]]) -> str:
    body = []
    for name, title in (("sharegpt", "ShareGPT, 2 requests/s"), ("alpaca", "Alpaca, 30 requests/s")):
        here = [row for row in rows if row["trace"].startswith(name)]
        body.append([title, *(f"{row['mean_batch']:.2f} ({_FIG_13[name][row['policy']]:.2f})" for row in here)])
    policies = [NAMES[row["policy"]] for row in rows[: len(rows) // 2]]
    return f"""## Fig. 13: sequences in a batch

OPT-13B, averages over busy time.

{_table(["", *policies], body)}

Quire's batch on Alpaca is larger than vLLM's was: 30 requests/s is where its curve turns, and there a batch grows with
the queue up to what memory holds (about 190). A step 5 % faster or slower moves it by tens of sequences, the sustained
rate by 5 %."""


def _rates(knees: Sequence[Knee], panels: Sequence[Panel]) -> list[list[str]]:
    """A line per panel: Quire's sustained rate, and the Orcas' with its multiple of them."""
    body = []
    for panel in panels:
        rates = {policy: _knee_of(knees, panel.label, policy) for policy in _ORCAS}
        cells = [f"{rates[policy]:.2f} · {rates['paged'] / rates[policy]:.2f}×" for policy in _ORCAS[1:]]
        body.append([panel.label, f"{rates['paged']:.2f}", *cells])
    return body


def _ratio(knees: Sequence[Knee], label: str, policy: str = "orca-oracle") -> float:
    return _knee_of(knees, label, "paged") / _knee_of(knees, label, policy)


def _fig_14(knees: Sequence[Knee], freed: float, crowds: Sequence[dict[str, Any]]) -> str:
    basic, widest = _ratio(knees, "d"), _ratio(knees, "beam 6")
    near = abs(widest / 2.3 - 1) <= 0.15
    oracle, paged = (row["mean_batch"] for row in crowds)
    return f"""## Fig. 14: parallel sampling and beam search

OPT-13B, Alpaca; the Orcas keep a prompt for every sample and every beam. Sustained requests per second at
{THRESHOLD} s/token, over {SHARING[0].seconds:g} s of arrivals:

{_table(["sequences", *(NAMES[policy] for policy in _ORCAS)], _rates(knees, SHARING))}

![Fig. 14](paper/fig14-sharing.svg)

What a model says of beams is modelled: of the next token's probability the likeliest one takes a share drawn evenly
from 0 to 1, the next one such a share of the rest, and so on, 1 nat of entropy on average. The search itself, its forks
and its copies are the engine's.

Over Orca (Oracle) Quire goes from {basic:.2f}× in basic sampling (printed 1.3×) to {widest:.2f}× at six beams (printed
2.3×): {"comes out" if near else "does not come out"}. {_why_not(freed, 2.3)} With a full queue Quire then runs
{paged:.0f} sequences at once where Orca (Oracle) runs {oracle:.0f}, but from some 130 on, a step's products take longer
with every one of them: computing bounds it, not memory."""


def _why_not(freed: float, printed: float) -> str:
    """The multiple if only memory bounds Quire."""
    least = f"With 1024 sequences at most instead of 256, and no overhead per sequence, it is {freed:.2f}×"
    if abs(freed / printed - 1) <= 0.15:
        return f"{least}: those two bound Quire here, which sharing memory does not help."
    return f"{least}, so these two explain {'a part' if freed < printed else 'more than the difference'}."


def _fig_15(rows: Sequence[dict[str, Any]]) -> str:
    def line(row: dict[str, Any]) -> list[str]:
        printed = _FIG_15[row["option"]][row["width"]] if row["trace"].startswith("alpaca") else None
        kind = "samples" if row["option"] == "n" else "beams"
        saved = f"{row['saved_by_sharing_pct']:.1f}" + (f" ({printed:.1f})" if printed else "")
        return [row["trace"].split("_")[0], f"{row['width']} {kind}", f"{row['rate']:g}", saved]

    saved = {
        option: [
            row["saved_by_sharing_pct"]
            for row in rows
            if row["option"] == option and row["trace"].startswith("sharegpt")
        ]
        for option in _FIG_15_SHAREGPT
    }
    said = ", ".join(
        f"{name} {min(saved[option]):.1f}–{max(saved[option]):.1f} % (printed {least}–{most} %)"
        for (option, (least, most)), name in zip(_FIG_15_SHAREGPT.items(), ("samples", "beams"), strict=True)
    )
    return f"""## Fig. 15: memory saved by sharing

OPT-13B; blocks saved in % of those needed without sharing, averaged over time.

{_table(["trace", "sequences", "requests/s", "saved, %"], [line(row) for row in rows])}

On ShareGPT, for which the text prints ranges only: {said}.

Samples save somewhat more here than printed. What they share is the prompt, and all samples of a request end together,
because a trace has one length per request; in the paper those that ended early no longer shared it, and prompts may
have been shorter beside outputs than in this synthetic Alpaca. What beams save depends on how far back their last
common ancestor lies, so on the model's probabilities, and the more so the longer outputs are: that one plain choice of
these comes near on Alpaca says that the mechanism is the same, not more. On ShareGPT, whose outputs are six times as
long, it makes six beams part later than OPT-13B did."""


def _fig_16(knees: Sequence[Knee], freed: float) -> str:
    said = []
    for panel in PREFIXES:
        ratio, printed = _ratio(knees, panel.label), _FIG_16[panel.value]
        verdict = "comes out" if abs(ratio / printed - 1) <= 0.15 else "does not come out in size"
        said.append(f"{ratio:.2f}× with {panel.value} tokens (printed {printed}×): {verdict}")
    return f"""## Fig. 16: a shared prefix

LLaMA-13B translates: every prompt begins with the same 80 tokens (one example) or 341 (five). Quire holds them, the
Orcas store and compute them for every request. The paper prints no lengths of WMT16's sentences; these are log-normal
with means of {WMT_MEANS[0]} and {WMT_MEANS[1]} tokens. Sustained requests per second at {THRESHOLD} s/token:

{_table(["", *(NAMES[policy] for policy in _ORCAS)], _rates(knees, PREFIXES))}

Over Orca (Oracle): {"; ".join(said)}. {_why_not(freed, _FIG_16[341])} What is gained depends on how long sentences are
beside the prefix, too."""


def _fig_17(knees: Sequence[Knee], crowds: Sequence[dict[str, Any]]) -> str:
    policies = _ORCAS
    rates = [_knee_of(knees, "chat", policy) for policy in policies]
    others = [rates[0] / rate for rate in rates[1:]]
    coincide = max(others) < 1.15 * min(others)
    fewest, _, most, paged = (row["mean_batch"] for row in crowds)
    came_out = "comes out" if min(others) > 1.8 else "does not come out, nor does it of the drawn curves"
    verdict = "comes out" if coincide else "comes out in part: where prompts are shorter than 1024 they differ"
    return f"""## Fig. 17: chat

OPT-13B, whole ShareGPT conversations: the last 1024 tokens of history as the prompt, at most 1024 new ones. Sustained
requests per second at {THRESHOLD} s/token:

{_table(["Quire", *(NAMES[policy] for policy in policies[1:])], [[f"{rate:.2f}" for rate in rates]])}

Quire sustains {min(others):.2f}× to {max(others):.2f}× the rate of the Orcas, printed 2×: {came_out}. With a full
queue {paged:.1f} requests run at once, in the Orcas {fewest:.1f} to {most:.1f}; but a step reads more KV for more of
them, and computing prompts of 1,024 tokens, which takes a part of the time, does not gain by memory at all.

That the three coincide, because long prompts make the buddy allocator round every reservation up to 2048 slots,
{verdict}."""


def _fig_18(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["trace"] for row in rows))
    sizes = list(dict.fromkeys(row["block_size"] for row in rows))
    body, verdicts = [], []
    for name in names:
        here = {row["block_size"]: row for row in rows if row["trace"] == name}
        rate = here[sizes[0]]["rate"]
        latencies = [f"{1000 * here[size]['normalized_latency_mean']:.0f}" for size in sizes]
        body.append([f"{name.split('_')[0]}, {rate:g} requests/s, ms per token", *latencies])
        default = here[16]["normalized_latency_mean"]
        good = [size for size in sizes if here[size]["normalized_latency_mean"] <= 1.2 * default]
        verdicts.append(f"- {name.split('_')[0]}: within 1.2 times the latency of 16 up to {max(good)}.")
        body.append(["waste of taken blocks, %", *(f"{here[size]['internal_pct']:.1f}" for size in sizes)])
    return f"""## Fig. 18b: block size

OPT-13B. Only what the block size does to memory is modelled; that small blocks make the kernel slower, which is the
left half of the printed figure, is not.

{_table(["block size", *map(str, sizes)], body)}

![Fig. 18b](paper/fig18b-block-size.svg)

{chr(10).join(verdicts)}

The right half of the printed figure has Alpaca, whose sequences are shorter than a large block, clearly worse above 32,
and ShareGPT good up to 128. Alpaca comes out by memory alone. ShareGPT does up to 32 only at this rate, close to what
is sustained: there every block that is half empty shortens the batch, and below that it costs nothing."""


def _fig_19(rows: Sequence[tuple[int, float, float]], ends: Sequence[dict[str, Any]]) -> str:
    body = [
        ["swap out and in, ms", *(f"{1000 * swap:.0f}" for _, swap, _ in rows)],
        ["recompute, ms", *(f"{1000 * recompute:.0f}" for _, _, recompute in rows)],
    ]
    most = max(recompute / swap for _, swap, recompute in rows)
    sizes = list(dict.fromkeys(row["block_size"] for row in ends))
    swapped, recomputed = (
        [row["normalized_latency_mean"] for row in ends if row["swaps"] is swaps] for swaps in (True, False)
    )
    apart = 100 * max(abs(one / other - 1) for one, other in zip(swapped, recomputed, strict=True))
    end_to_end = [
        ["swapped, ms per token", *(f"{1000 * latency:.0f}" for latency in swapped)],
        ["recomputed, ms per token", *(f"{1000 * latency:.0f}" for latency in recomputed)],
    ]
    return f"""## Fig. 19: swapping and recomputing

A formula, no simulation: 256 tokens of OPT-13B; a copy per block, layer and side of KV takes 10 µs, the link moves
25 GB/s, a computed prompt takes what a step takes.

{_table(["block size", *(str(size) for size, _, _ in rows)], body)}

Small blocks make swapping slow, recomputing does not care, and large blocks favour swapping: this comes out. That
recomputing never takes more than 1.2 times as long as swapping does not: here it takes up to {most:.1f} times, because
the link is taken at its full rate.

End to end, in simulation at {ends[0]["rate"]:g} requests/s of ShareGPT, {
        ends[0]["preemptions"]
    } preemptions at blocks of
{sizes[0]}: what is preempted is named, leaves for host memory when its blocks are needed, and comes back on a hit where
that is faster; or there is no cache and all is computed anew.

{_table(["block size", *map(str, sizes)], end_to_end)}

At blocks of 16 to 64 the two are said to be equal: they are {apart:.1f} % apart at most, which {
        "comes out" if apart < 5 else "does not come out"
    }."""


def _hits(rows: Sequence[dict[str, Any]]) -> str:
    pools = list(dict.fromkeys(row["kv_slots"] for row in rows))
    body = [[name, *(f"{row['prefix_hit_pct']:.1f}" for row in rows if row["tiers"] == name)] for name, _ in TIERS]
    alone = [row for row in rows if row["tiers"] == "none"]
    blocks, tokens = rows[0]["unbounded_prefix_hit_pct"], rows[0]["unbounded_prefix_hit_tokens_pct"]
    return f"""## Not in the paper: prefix caching and tiers on Mooncake's conversations

The first 1500 requests with their own arrivals, Llama-3.1-8B on eight H100, blocks of 512 tokens, 128 KiB a token.
A cache that forgets nothing would hit {blocks:.1f} % of prompt blocks, {tokens:.1f} % of prompt tokens; outputs, which
the trace does not name, are not counted. What is evicted goes to the tiers below and comes back on a hit, if loading
takes less than computing by the rates that the scheduler measures: the index and the decisions are the engine's own.
Hits in % of prompt tokens, by the tokens that the pool holds:

{_table(["below the pool", *(f"{slots / 2**20:g} Mi" for slots in pools)], body)}

![Hit rates](paper/mooncake-tiers.svg)

Without tiers the largest batches have {", ".join(str(row["peak_batch"]) for row in alone)} sequences. A disk of 6 GB/s
gives next to nothing: it takes 11 ms to bring a block that eight H100 compute in 2."""


def _headlines(results: dict[str, Any]) -> str:
    waste = {row["policy"]: row for row in results["fig_2"]}
    batch = {row["policy"]: row["mean_batch"] for row in results["fig_13"] if row["trace"].startswith("sharegpt")}
    others = [waste[policy]["token_states_pct"] for policy in ("orca-max", "orca-pow2", "orca-oracle")]
    saved = {
        option: [
            row["saved_by_sharing_pct"]
            for row in results["fig_15"]
            if row["option"] == option and row["trace"].startswith("alpaca")
        ]
        for option in _FIG_15
    }
    knees = results["knees"]
    prefixes = ", ".join(f"{_ratio(knees, panel.label):.2f}×" for panel in PREFIXES)
    throughput = [
        _knee_of(knees, label, "paged") / _knee_of(knees, label, policy)
        for label in "abcdef"
        for policy in ("orca-oracle", "orca-max")
    ]
    return f"""## The headlines

| claim | printed | here |
| --- | --- | --- |
| KV memory that holds tokens, before | 20.4–38.2 % | {min(others):.1f}–{max(others):.1f} % |
| and with paging | ≥ 96 % | {waste["paged"]["token_states_pct"]:.1f} % |
| requests at once over Orca (Oracle), ShareGPT | 2.2× | {batch["paged"] / batch["orca-oracle"]:.2f}× |
| and over Orca (Max) | 4.3× | {batch["paged"] / batch["orca-max"]:.2f}× |
| saved by sharing, parallel sampling | 6.1–9.8 % | {min(saved["n"]):.1f}–{max(saved["n"]):.1f} % |
| saved by sharing, beam search | 37.6–55.2 % | {min(saved["beam_width"]):.1f}–{max(saved["beam_width"]):.1f} % |
| over Orca (Oracle) with six beams | 2.3× | {_ratio(knees, "beam 6"):.2f}× |
| with a shared prefix of 80, 341 tokens | 1.67×, 3.58× | {prefixes} |
| throughput over Orca (Oracle) and (Max), all of Fig. 12 | 2–4× | {min(throughput):.2f}–{max(throughput):.2f}× |"""


def _missing() -> str:
    return """## Not here

Fig. 18a measures a kernel and cannot be simulated; docs/benchmarks.md has the figures of Quire's own."""


_SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "fig2": lambda results: _fig_2(results["fig_2"]),
    "fig12": lambda results: _fig_12(results["knees"], dict(results["bounds"])["c"]),
    "fig13": lambda results: _fig_13(results["fig_13"]),
    "fig14": lambda results: _fig_14(results["knees"], dict(results["bounds"])["beam 6"], results["beams"]),
    "fig15": lambda results: _fig_15(results["fig_15"]),
    "fig16": lambda results: _fig_16(results["knees"], dict(results["bounds"])["prefix 341"]),
    "fig17": lambda results: _fig_17(results["knees"], results["fig_17"]),
    "fig18": lambda results: _fig_18(results["fig_18"]),
    "fig19": lambda results: _fig_19(results["fig_19"], results["preempted"]),
    "mooncake": lambda results: _hits(results["hits"]),
}
"""The sections of the page in order, by the names that --only takes."""
