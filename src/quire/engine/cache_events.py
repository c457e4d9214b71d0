"""CacheEvents: publishes after each step what it changed in the KV cache and the tiers."""

import time

from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.tiers import TierIndex
from quire.kv_events_config import KVEventsConfig


class CacheEvents:
    """Owned by the engine core."""

    def __init__(self, config: KVEventsConfig, pool: BlockPool, tiers: TierIndex | None) -> None:
        """Raises `ConfigError` for an address that cannot be used."""
        # Only here: an engine that publishes nothing needs neither of msgspec and ZeroMQ.
        from quire.kv_events.publisher import EventPublisher, cleared
        from quire.kv_events.recorder import EventRecorder

        self._publisher = EventPublisher(config)
        self._recorder = EventRecorder(pool, tiers, config.hash)
        self._publisher.publish(time.time(), cleared())

    def publish(self) -> None:
        """Send the events since the last call, if there are any."""
        events = self._recorder.take()
        if events:
            self._publisher.publish(time.time(), events)

    def close(self) -> None:
        self._publisher.close()
