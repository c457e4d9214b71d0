"""BackendsFile: a list of servers that changes while the router runs."""

import asyncio
import logging
from pathlib import Path

from quire.errors import ConfigError
from quire.router.backends import Backends
from quire.router.settings import check_urls

logger = logging.getLogger(__name__)

_MAX_BYTES = 2**20


class BackendsFile:
    """One URL on each line; empty lines, and lines that begin with #, say nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._problem = ""

    def read(self) -> tuple[str, ...]:
        """The servers on the list. Raises `ConfigError` for a file that is none."""
        try:
            with self._path.open("rb") as file:
                text = file.read(_MAX_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"backends_file {self._path} cannot be read: {error}") from None
        lines = (line.strip().rstrip("/") for line in text.splitlines())
        urls = tuple(line for line in lines if line and not line.startswith("#"))
        if not urls:
            raise ConfigError(f"backends_file {self._path} names no server; write one URL on each line")
        check_urls(f"backends_file {self._path}", urls)
        return urls

    async def follow(self, backends: Backends, seconds: float) -> None:
        """Keep `backends` as the file says, for ever. While it cannot be read, the last list holds."""
        while True:
            await asyncio.sleep(seconds)
            self.apply(backends)

    def apply(self, backends: Backends) -> None:
        """Read the file once. What is wrong with it is logged once."""
        try:
            urls, problem = self.read(), ""
        except ConfigError as error:
            problem = f"{error}; the servers stay as they are"
        else:
            backends.keep(urls)
        if problem and problem != self._problem:
            logger.warning("%s", problem)
        self._problem = problem
