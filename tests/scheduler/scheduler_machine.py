"""SchedulerMachine: requests of every kind come, go and are preempted, in any order."""

import contextlib
from typing import Literal
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.errors import RequestError
from quire.request import BACKGROUND
from quire.scheduler import length_curve
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES
from tests.scheduler.checked_engine import Engine, Guesses, embed_request, new_request
from tests.scheduler.fake_runner import (
    alone,
)

WINDOWS = [(0,), (0,), (0,), (3,), (1,), (9,), (0, 4), (0, 30), (0, 1, 8), (0, 0, 5), (6, 6, 2)]
"""Windows of KV groups: smaller than a block, equal to one, larger than one, larger than a prompt, and mixes."""


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of every kind come, go and are preempted; each gets the tokens it would get alone."""

    def __init__(self) -> None:
        super().__init__()
        self.predicts_early = patch.object(length_curve, "MIN_ANSWERS", 2)
        self.predicts_early.start()

    @initialize(
        num_blocks=st.integers(1, 64),
        block_size=st.integers(1, 8),
        max_num_seqs=st.integers(1, 8),
        more_budget=st.sampled_from([0, 1, 3, 8, 40]),
        max_num_partial_prefills=st.integers(1, 4),
        caching=st.booleans(),
        longest_draft=st.sampled_from([0, 0, 1, 3, 9]),
        overlaps=st.booleans(),
        num_failures=st.sampled_from([0, 0, 1, 5]),
        policy=st.sampled_from(list(SCHEDULING_POLICIES)),
        admission=st.sampled_from(list(ADMISSIONS)),
        windows=st.sampled_from(WINDOWS),
        num_snapshots=st.sampled_from([None, None, 0, 1, 3, 20]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        more_budget: int,
        max_num_partial_prefills: int,
        caching: bool,
        longest_draft: int,
        overlaps: bool,
        num_failures: int,
        policy: str,
        admission: str,
        windows: tuple[int, ...],
        num_snapshots: int | None,
    ) -> None:
        self.engine = Engine(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + more_budget,
            max_num_partial_prefills=max_num_partial_prefills,
            enable_prefix_caching=caching,
            guesses=Guesses(num_blocks, longest_draft) if longest_draft else None,
            overlaps=overlaps,
            num_failures=num_failures,
            policy=policy,
            admission=admission,
            windows=windows,
            num_snapshots=num_snapshots,
        )
        self.num_requests = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        prefix=st.integers(0, 12),
        max_tokens=st.integers(1, 24),
        n=st.sampled_from([1, 1, 2, 4]),
        seed=st.integers(-2, 6),
        priority=st.sampled_from((0, 1, BACKGROUND)),
        salt=st.sampled_from(["", "", "b"]),
        logprobs=st.sampled_from([None, None, 1]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        resumed=st.none() | st.lists(st.integers(0, 20), min_size=4, max_size=4),
        can_stop=st.booleans(),
        more_beams=st.sampled_from([None, None, 0, 1, 3]),
        length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
        early_stopping=st.sampled_from([True, False, "never"]),
        structured=st.sampled_from([False, False, True]),
        times=st.sampled_from([1, 1, 3]),
    )
    def add(
        self,
        prompt: list[int],
        prefix: int,
        max_tokens: int,
        n: int,
        seed: int,
        priority: int,
        salt: str,
        logprobs: int | None,
        prompt_logprobs: int | None,
        resumed: list[int] | None,
        can_stop: bool,
        more_beams: int | None,
        length_penalty: float,
        early_stopping: bool | Literal["never"],
        structured: bool,
        times: int,
    ) -> None:
        for _ in range(times):
            request = new_request(
                f"request {self.num_requests}",
                [0] * prefix + prompt,
                max_tokens,
                n=n,
                seed=seed,
                priority=priority,
                salt=salt,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                can_stop=can_stop,
                beam_width=None if more_beams is None else n + more_beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                structured=structured,
            )
            if resumed is not None and more_beams is None:
                for index, length in enumerate(resumed[:n]):
                    ending = alone(request, index)
                    if length < len(ending.token_ids):
                        request.output_token_ids[index] = ending.token_ids[:length]
            self.num_requests += 1
            # What can never run is refused; that it is refused for good reason has its own test.
            with contextlib.suppress(RequestError):
                self.engine.add(request)
            self.engine.check()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=48),
        prefix=st.integers(0, 12),
        seed=st.integers(-2, 6),
        priority=st.sampled_from((0, 1, BACKGROUND)),
        salt=st.sampled_from(["", "", "b"]),
        times=st.sampled_from([1, 1, 3]),
    )
    def embed(self, prompt: list[int], prefix: int, seed: int, priority: int, salt: str, times: int) -> None:
        for _ in range(times):
            name = f"request {self.num_requests}"
            self.num_requests += 1
            with contextlib.suppress(RequestError):
                self.engine.add(embed_request(name, [0] * prefix + prompt, seed=seed, priority=priority, salt=salt))
            self.engine.check()

    @precondition(lambda self: self.engine.clients)
    @rule(num_steps=st.integers(1, 20))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    @precondition(lambda self: self.engine.clients)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.clients))))

    @precondition(lambda self: self.engine.clients)
    @rule(data=st.data(), index=st.integers(0, 3))
    def stop(self, data: st.DataObject, index: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.engine.clients)))
        client = self.engine.clients[request_id]
        if index in client.token_ids and client.request.params.beam_width is None:
            self.engine.stop(request_id, index)

    @rule()
    def report(self) -> None:
        self.engine.scheduler.memory_report()
        if self.engine.in_flight is None:
            members = self.engine.scheduler._queues.decode_batch.sequences
            assert all(member.table.num_tokens == member.num_computed_tokens for member in members)

    @rule()
    def forget_hashes(self) -> None:
        self.engine.pool.clear_hashes()

    @precondition(lambda self: self.engine.clients)
    @rule()
    def run_to_the_end(self) -> None:
        tokens = sum(
            (client.request.params.beam_width or len(client.token_ids))
            * (len(client.request.prompt_token_ids) + client.request.max_tokens)
            for client in self.engine.clients.values()
        )
        self.engine.run(max_steps=2 * tokens + 50 * self.engine.num_failures + 2)

    @invariant()
    def the_pool_agrees(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine"):
                self.run_to_the_end()
        finally:
            self.predicts_early.stop()
