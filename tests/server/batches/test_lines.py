"""Input files of batches: the limit of their length."""

from pathlib import Path

from quire.server.batches.lines import MAX_LINES, check_lines

URL = "/v1/completions"


def test_fifty_thousand_lines_are_accepted_and_one_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    text = "".join(
        f'{{"custom_id":"r{index}","method":"POST","url":"{URL}","body":{{}}}}\n' for index in range(MAX_LINES)
    )
    path.write_text(text)
    assert MAX_LINES == 50_000
    assert check_lines(path, URL) == (MAX_LINES, [])
    path.write_text(text + f'{{"custom_id":"more","method":"POST","url":"{URL}","body":{{}}}}\n')
    _, (error,) = check_lines(path, URL)
    assert error.code == "too_many_requests"
    assert "50000" in error.message
