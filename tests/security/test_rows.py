"""Every row of the list of published flaws has tests, and docs/published-flaws.md names them."""

import re

from scripts.write_flaws_page import PAGE, page, rows


def test_every_row_is_tried() -> None:
    assert sorted(rows()) == list(range(1, 42))


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python scripts/write_flaws_page.py"


def test_every_test_names_its_flaw() -> None:
    for tests in rows().values():
        assert any(re.search(r"CVE-\d{4}-\d+|PYSEC-|GHSA-", test.doc) for test in tests), tests
