"""Every configuration, compiled for GPUs that are not here: what a launch would need must fit, and the instructions
that make it fast must be there. Speed itself only a GPU can show."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels.triton.compiler_run import run_with_compiler

REGISTERS_PER_SM = 65536
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_RESERVED = 1024
"""Of shared memory, what the system takes of each program."""


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run_with_compiler("compile_kernels")


def failing(reports: list[dict[str, Any]], rule: Callable[[dict[str, Any]], bool]) -> list[str]:
    assert reports
    return [str(report) for report in reports if not rule(report)]


def programs_per_sm(report: dict[str, Any]) -> int:
    """What the planner counts on; an A100 has less shared memory than the GPUs it is meant for."""
    planned = int(report.get("programs_per_sm", 1))
    return min(planned, 2) if report["architecture"] == 80 else planned


def test_no_register_is_spilled(reports: list[dict[str, Any]]) -> None:
    assert failing(reports, lambda report: report["stack"] == 0) == []


def test_as_many_programs_fit_a_multiprocessor_as_the_planner_counts_on(reports: list[dict[str, Any]]) -> None:
    def fits(report: dict[str, Any]) -> bool:
        registers = -(-report["registers"] // 8) * 8 * 32 * report["num_warps"]
        shared = report["shared"] + SHARED_RESERVED
        num_programs = programs_per_sm(report)
        return (
            registers * num_programs <= REGISTERS_PER_SM
            and shared * num_programs <= SHARED_PER_SM[report["architecture"]]
        )

    assert failing(reports, fits) == []


def test_decode_copies_keys_asynchronously_16_bytes_at_a_time(reports: list[dict[str, Any]]) -> None:
    decode = [report for report in reports if report.get("rows") in (16, 32)]
    assert failing(decode, lambda report: report["async_copies_16"] > 0) == []


def test_prefill_uses_the_matrix_units_of_hopper(reports: list[dict[str, Any]]) -> None:
    prefill = [report for report in reports if report.get("rows", 0) >= 64 and report["architecture"] == 90]
    assert failing(prefill, lambda report: report["wgmma"] > 0) == []
