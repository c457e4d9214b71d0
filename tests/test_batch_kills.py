"""The short version of `benchmarks.batch_kills`: a batch survives kill -9 of the engine, and of the server."""

from benchmarks.batch_kills import run


def test_every_line_is_answered_once_whatever_is_killed() -> None:
    kills = iter([10, 30])
    next_kill = next(kills)

    def due(_: float, answered: int) -> bool:
        nonlocal next_kill
        if answered < next_kill:
            return False
        next_kill = next(kills, 1000)
        return True

    outcome = run(60, max_tokens=24, due=due, flags=("--threads", "1", "--no-spare", "--batch-concurrency", "4"))
    assert outcome.kills == {"engine": 1, "server": 1}
    assert outcome.faults(60) == []
