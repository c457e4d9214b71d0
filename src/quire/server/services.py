"""Services: what endpoints share besides the engine. One per server; each holds its own state."""

from dataclasses import dataclass, field

from quire.server.door import Door
from quire.server.field_warnings import FieldWarnings
from quire.server.key_use import KeyRing
from quire.server.media_fetch import MediaFetcher
from quire.server.responses.runs import BackgroundRuns
from quire.server.responses.store import ResponseStore
from quire.server.settings import ServerSettings
from quire.server.traces import Traces


@dataclass(frozen=True, slots=True)
class Services:
    """Shared by all requests of one server."""

    responses: ResponseStore
    keys: KeyRing
    media: MediaFetcher
    traces: Traces | None = None
    """None: nothing is traced."""
    runs: BackgroundRuns = field(default_factory=BackgroundRuns)
    warnings: FieldWarnings = field(default_factory=FieldWarnings)
    door: Door = field(default_factory=Door)

    @classmethod
    def open(cls, settings: ServerSettings, keys: KeyRing, traces: Traces | None = None) -> "Services":
        """Raises `ConfigError` for a file that cannot be used."""
        store = ResponseStore(settings.responses_store, settings.responses_store_size)
        return cls(store, keys, MediaFetcher.of(settings), traces)
