"""Images whose tokens see each other (Gemma 3), in a step of a decoder whose other tokens see those before them.

The tokens of an image that a step computes are a run. For the planners each run is a sequence of its own over the same
blocks, all of whose tokens see the keys up to the run's end: no kernel knows of images. A step computes an image to its
end, so the keys are there.
"""

from collections.abc import Sequence

import numpy as np

from quire.attention.inputs import ALL_POSITIONS, AttentionShape, StepArrays

Run = tuple[int, int]
"""Index of the first token of a run among those of the step, and the number of its tokens."""


def split_at_images(step: StepArrays, runs: Sequence[Run], shape: AttentionShape) -> StepArrays:
    """The step with its runs as sequences, and what lies between them.

    With a window a run is cut into sequences so short that some keys are seen by all tokens of one.
    In a batch-invariant plan each token is one, since what its run begins with depends on the chunk.
    """
    most = ALL_POSITIONS if shape.window == 0 else max(1, shape.window - shape.image_tokens)
    most = 1 if shape.batch_invariant else most
    cuts = set(step.query_start_loc.tolist())
    for first, count in runs:
        cuts.update((*range(first, first + count, most), first + count))
    bounds = np.array(sorted(cuts), dtype=np.int32)
    begin, end = bounds[:-1], bounds[1:]
    sequence = np.searchsorted(step.query_start_loc, begin, side="right") - 1
    lookaheads = np.zeros(len(begin), dtype=np.int32)
    for first, count in runs:
        inside = (begin >= first) & (begin < first + count)
        lookaheads[inside] = first + count - 1 - begin[inside]
    return StepArrays(
        bounds,
        step.seq_lens[sequence] - (step.query_start_loc[sequence + 1] - end),
        step.block_tables[sequence],
        step.slots,
        lookaheads,
    )
