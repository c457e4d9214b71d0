"""Step plans as bytes: what rank 0 sends to the other ranks, which compute all of a step but its samples."""

from dataclasses import replace

import msgspec

from quire.sampling_params import SamplingParams
from quire.step import NewRow, StepPlan

_ANY = SamplingParams()
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(StepPlan)


def encode_plan(plan: StepPlan) -> bytes:
    """A plan without what only sampling reads: parameters and texts of new rows."""
    if plan.new_rows:
        plan = replace(plan, new_rows=[_without_texts(row) for row in plan.new_rows])
    return _ENCODER.encode(plan)


def decode_plan(body: bytes) -> StepPlan:
    return _DECODER.decode(body)


def _without_texts(row: NewRow) -> NewRow:
    return replace(row, params=_ANY, prompt_token_ids=[], output_token_ids=[], stop_token_ids=())
