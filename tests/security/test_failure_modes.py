"""Failure modes of a server, and the tests that hold what is promised for each. A mode without a test says why."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

MODES: dict[str, tuple[str, ...]] = {
    "a client leaves": ("engine/test_async_engine.py::test_leaving_a_stream_frees_its_memory_within_a_step",),
    "a slow reader": (
        "server/test_streaming.py::test_a_client_that_does_not_read_is_waited_for_and_then_dropped",
        "engine/test_async_engine.py::test_a_slow_reader_gets_merged_deltas",
    ),
    "overload": ("engine/test_async_engine.py::test_a_full_queue_answers_429",),
    "a body or prompt too large": (
        "server/test_limits.py::test_body_too_large",
        "server/test_limits.py::test_prompt_characters",
        "security/test_published_flaws.py::test_33_headers_are_limited",
    ),
    "bad JSON": ("server/test_limits.py::test_malformed_bodies", "server/test_fuzz.py::test_no_body_is_a_fault"),
    "logits that are not finite": ("security/test_flaws_of_the_engine.py::test_a_faulty_row_ends_one_sample_alone",),
    "the engine dies": ("engine/test_deaths.py::test_kills_from_outside_and_during_loads_blame_nobody",),
    "a request that kills": ("engine/test_deaths.py::test_only_the_requests_that_kill_are_ended_and_then_refused",),
    "KV exhausted": (
        "scheduler/test_scheduler_machine.py::test_crowds_in_a_pool_that_hardly_holds_the_largest_of_them",
    ),
    "host memory short": (
        "test_chaos.py::test_streams_of_every_kind_survive_faults",
        "server/test_memory_return.py::test_memory_returns_after_large_bodies",
    ),
    "a full disk": (
        "runner/test_disk_blocks.py::test_a_full_disk_stops_writing_and_leaves_no_half_file",
        "server/test_store_faults.py::test_a_batch_goes_on_by_itself",
        "server/test_responses.py::test_a_full_disk_keeps_what_is_stored",
    ),
    "SIGTERM": (
        "server/test_listen.py::test_sigterm_lets_running_requests_finish",
        "engine/test_deaths.py::test_a_shutdown_at_the_moment_of_a_death_finishes_what_runs",
    ),
    "a damaged checkpoint": (
        "models/test_weights.py::test_truncated_data",
        "gguf/test_header.py::test_mutated_files_are_read_or_refused",
    ),
    "a hostile template or pickle": (
        "engine/test_chat_template_process.py::test_hostile_templates_cost_a_process_and_no_more",
        "security/test_published_flaws.py::test_07_pickled_weights_are_refused_unread",
    ),
    "a grammar bomb": ("engine/test_grammar_checker.py::test_an_explosion_ends_soon_and_the_next_grammar_is_checked",),
    "a clock that jumps": ("security/test_failure_modes.py::test_only_monotonic_time_decides",),
    "a leak": ("test_chaos.py::test_a_server_ends_a_short_soak_as_it_began",),
    "a batch killed anywhere": ("test_batch_kills.py::test_every_line_is_answered_once_whatever_is_killed",),
    "the engine hangs": ("engine/test_deaths.py::test_an_engine_that_does_not_advance_is_replaced",),
    "a start that cannot be": ("server/test_listen.py::test_a_used_port_is_one_line",),
}

STAMPS = {
    "engine/cache_events.py",
    "engine/chat_template.py",
    "router/requests.py",
    "server/batches/endpoints.py",
    "server/endpoint.py",
    "server/models.py",
    "server/ollama/renderer.py",
    "server/responses/renderer.py",
    "server/responses/store.py",
    "server/traces.py",
}
"""Files that show the time of day: dates of objects, in replies and events."""


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_its_tests(mode: str) -> None:
    for test in MODES[mode]:
        file, _, name = test.partition("::")
        functions = {node.name for node in ast.parse((TESTS / file).read_text()).body if hasattr(node, "name")}
        assert name in functions, test


def test_only_monotonic_time_decides() -> None:
    """A clock that is set back or forward changes no deadline, no queue and no watchdog: nothing else reads it."""
    source = TESTS.parent / "src" / "quire"
    found = set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(ast.Name("time"), "time" | "time_ns") | ast.Attribute(ast.Name("datetime"), "now"):
                    found.add(str(path.relative_to(source)))
    assert found <= STAMPS, f"{sorted(found - STAMPS)} read the time of day; use time.monotonic()"
