"""Makes the parts of a scheduler and connects them."""

from collections.abc import Callable
from dataclasses import dataclass

from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.states import StatePool
from quire.kv_cache.tiers import TierIndex
from quire.scheduler.admission import Admission
from quire.scheduler.background_pace import BackgroundPace
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.demand import Demand
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.drafting import Drafting
from quire.scheduler.forecast import Forecast
from quire.scheduler.image_encoding import ImageEncoding
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.lookahead import LookAhead
from quire.scheduler.output_lengths import OutputLengths
from quire.scheduler.policies import AdmissionRule, MakeQueue, MakeRule
from quire.scheduler.prefix_lookup import PrefixLookup
from quire.scheduler.recurrent_states import RecurrentStates
from quire.scheduler.registered_prefixes import RegisteredPrefixes
from quire.scheduler.request_check import RequestCheck
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.result_processor import ResultProcessor
from quire.scheduler.step_planner import StepPlanner
from quire.scheduler.step_totals import StepTotals
from quire.scheduler.tenant_pace import TenantPace

WATERMARK = 0.01
"""Share of the pool that admission leaves free, so that running sequences can grow before any is preempted."""


@dataclass(frozen=True, slots=True)
class SchedulerParts:
    """Each is the only writer of its own state."""

    totals: StepTotals
    prefixes: RegisteredPrefixes
    check: RequestCheck
    queues: RequestQueues
    demand: Demand
    lookup: PrefixLookup
    results: ResultProcessor
    admission: Admission
    images: ImageEncoding
    planner: StepPlanner
    pace: BackgroundPace
    tenant_pace: TenantPace
    look_ahead: LookAhead
    offload: BlockOffload | None
    """None without tiers."""
    drafting: Drafting | None
    """None without speculation."""
    states: RecurrentStates | None
    """None without recurrent layers."""


def make_parts(
    pool: BlockPool,
    limits: SchedulerLimits,
    clock: Callable[[], float],
    *,
    tiers: TierIndex | None,
    speculation: DraftPlanner | None,
    state_pool: StatePool | None,
    make_queue: MakeQueue,
    make_rule: MakeRule,
) -> SchedulerParts:
    """The parts of a new scheduler."""
    watermark = int(pool.num_blocks * WATERMARK)
    totals, forecast = StepTotals(), Forecast(pool)
    states = None if state_pool is None else RecurrentStates(state_pool, pool)
    prefixes = RegisteredPrefixes(pool, int(pool.num_blocks * limits.max_pinned_share), state_pool)
    offload = None if tiers is None else BlockOffload(tiers, pool, state_pool)
    rule = make_rule(forecast, pool, totals)
    rules: list[AdmissionRule] = [forecast] if rule is None or rule is forecast else [forecast, rule]
    queues = RequestQueues(
        pool, limits.max_num_seqs, make_queue(totals), OutputLengths(), rules, offload, prefixes, states
    )
    lookup = PrefixLookup(pool, offload, clock, states)
    admission = Admission(
        pool,
        queues,
        lookup,
        rule,
        offload,
        clock,
        limits,
        watermark=watermark,
    )
    drafting: Drafting | None = None
    if speculation is not None:
        drafting = Drafting(
            speculation,
            pool,
            queues,
            clock,
            watermark=watermark,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
    images, pace = ImageEncoding(limits), BackgroundPace(clock, limits.background_delay)
    tenant_pace = TenantPace(clock, limits.background_delay, queues.waiting)
    return SchedulerParts(
        totals=totals,
        prefixes=prefixes,
        check=RequestCheck(limits, pool, prefixes),
        queues=queues,
        demand=Demand(pool, queues, forecast, totals),
        lookup=lookup,
        results=ResultProcessor(pool, queues, lookup, offload, prefixes, totals),
        admission=admission,
        images=images,
        planner=StepPlanner(pool, queues, admission, offload, drafting, images, pace, tenant_pace, limits=limits),
        pace=pace,
        tenant_pace=tenant_pace,
        look_ahead=LookAhead(pool, queues),
        offload=offload,
        drafting=drafting,
        states=states,
    )
