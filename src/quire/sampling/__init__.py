"""From logits to tokens: edits of logits, filters, sampling itself, and log-probabilities.

`Sampler.sample` is the pipeline from end to end; `SamplingState` is what it remembers of one sequence.
"""

from quire.sampling.sampler import Sampler, SampleResult
from quire.sampling.state import SamplingState

__all__ = ["SampleResult", "Sampler", "SamplingState"]
