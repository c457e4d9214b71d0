from quire.kv_cache.block_pool import BlockPool
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.waiting_queue import WaitingQueue

POOL = BlockPool(1, 1)


def new_group(arrival_number: int, priority: int = 0) -> SequenceGroup:
    request = Request(request_id="", prompt_token_ids=[1], params=SamplingParams(), priority=priority)
    return SequenceGroup(request, POOL, b"", arrival_number)


def pop_all(queue: WaitingQueue) -> list[tuple[int, int]]:
    popped = []
    while (group := queue.pop()) is not None:
        popped.append(group.order)
    return popped


def test_an_empty_queue() -> None:
    queue = WaitingQueue()
    assert (len(queue), queue.pop()) == (0, None)


def test_priority_then_arrival() -> None:
    queue = WaitingQueue()
    for arrival_number, priority in enumerate([0, 1, 0, -1, 1]):
        queue.push(new_group(arrival_number, priority))
    assert pop_all(queue) == [(-1, 3), (0, 0), (0, 2), (1, 1), (1, 4)]


def test_what_comes_back_keeps_its_place() -> None:
    queue = WaitingQueue()
    groups = [new_group(number) for number in range(3)]
    for group in groups:
        queue.push(group)
    assert queue.pop() is groups[0]
    queue.push(groups[0])
    assert pop_all(queue) == [(0, 0), (0, 1), (0, 2)]


def test_what_is_removed_is_gone() -> None:
    queue = WaitingQueue()
    groups = [new_group(number) for number in range(3)]
    for group in groups:
        queue.push(group)
    queue.remove(groups[0])
    queue.remove(groups[0])
    queue.remove(new_group(7))
    assert len(queue) == 2
    assert pop_all(queue) == [(0, 1), (0, 2)]


def test_clients_that_give_up_leave_nothing_behind() -> None:
    """While the head of the queue waits for memory, others may come and go for ever."""
    queue = WaitingQueue()
    head = new_group(-1)
    queue.push(head)
    for number in range(10_000):
        group = new_group(number)
        queue.push(group)
        queue.remove(group)
    assert len(queue) == 1
    assert len(queue._heap) < 100
    assert queue.pop() is head
