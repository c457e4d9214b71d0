import pytest

from quire.model_config import ARCHITECTURES
from tests.model_config.rows import ROWS


@pytest.fixture
def more_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with Mixtral and Gemma 2 in it."""
    for name, row in ROWS.items():
        monkeypatch.setitem(ARCHITECTURES, name, row)
