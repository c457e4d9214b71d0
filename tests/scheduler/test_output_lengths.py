import random

from quire.kv_cache.block_pool import BlockPool
from quire.request import Request, Task
from quire.sampling_params import SamplingParams
from quire.scheduler.length_curve import MIN_ANSWERS, Ending
from quire.scheduler.output_lengths import MAX_CLASSES, OutputLengths
from quire.scheduler.sequence import SequenceGroup

POOL = BlockPool(1, 1)


def new_group(lengths: OutputLengths, tenant: str = "", workload: str = "", max_tokens: int = 100) -> SequenceGroup:
    request = Request(
        request_id="",
        prompt_token_ids=[1],
        params=SamplingParams(),
        max_tokens=max_tokens,
        tenant=tenant,
        workload=workload,
    )
    group = SequenceGroup(request, POOL, b"", 0)
    lengths.enter(group)
    return group


def finish(lengths: OutputLengths, length: int, ending: Ending = Ending.NATURAL, **kind: str) -> None:
    group = new_group(lengths, **kind)  # type: ignore[arg-type]  # the texts of a request
    lengths.start(group)
    group.leader.token_ids += [0] * length
    lengths.end(group.leader, ending)


def predicted(lengths: OutputLengths, **kind: str) -> int | None:
    curve = new_group(lengths, **kind).length_curve  # type: ignore[arg-type]  # the texts of a request
    return None if curve is None else curve.quantile(0.5, 0, 1000)


def test_the_closest_class_that_has_shown_enough_is_asked() -> None:
    lengths = OutputLengths()
    assert predicted(lengths, tenant="a", workload="chat") is None
    for _ in range(2 * MIN_ANSWERS):
        finish(lengths, 50, tenant="b")
    assert predicted(lengths, tenant="a", workload="chat") == 50
    for _ in range(MIN_ANSWERS):
        finish(lengths, 20, tenant="a", workload="code")
    assert predicted(lengths, tenant="a", workload="chat") == 20
    for _ in range(MIN_ANSWERS):
        finish(lengths, 9, tenant="a", workload="chat")
    assert predicted(lengths, tenant="a", workload="chat") == 9
    assert predicted(lengths, tenant="a", workload="code") == 20


def test_a_tenant_whose_limits_mean_nothing_spoils_nobody_else_s_prediction() -> None:
    lengths, draw = OutputLengths(), random.Random(0)
    for _ in range(4 * MIN_ANSWERS):
        finish(lengths, 30, tenant="honest")
        group = new_group(lengths, tenant="liar", max_tokens=draw.randint(1, 100_000))
        lengths.start(group)
        group.leader.token_ids += [0] * 3
        lengths.end(group.leader, Ending.NATURAL)
    assert predicted(lengths, tenant="honest") == 30
    assert predicted(lengths, tenant="liar") == 3


def test_who_never_ran_says_nothing() -> None:
    lengths = OutputLengths()
    for _ in range(MIN_ANSWERS):
        lengths.end(new_group(lengths).leader, Ending.ABORTED)
    assert predicted(lengths) is None


def test_classes_are_bounded() -> None:
    lengths = OutputLengths()
    for number in range(2 * MAX_CLASSES):
        finish(lengths, 5, tenant=f"tenant {number}")
    assert len(lengths._classes) == MAX_CLASSES


def test_vectors_have_no_length_and_teach_none() -> None:
    lengths = OutputLengths()
    for _ in range(2 * MIN_ANSWERS):
        request = Request(
            request_id="", prompt_token_ids=[1], params=SamplingParams(), task=Task.EMBED, max_tokens=0, tenant="a"
        )
        group = SequenceGroup(request, POOL, b"", 0)
        lengths.enter(group)
        lengths.start(group)
        assert group.length_classes == ()
        assert group.length_curve is not None
        assert (group.length_curve.quantile(0.9, 0, 0), group.length_curve.mean(0, 0)) == (0, 0.0)
        lengths.end(group.leader, Ending.ABORTED)
    assert predicted(lengths, tenant="a") is None
