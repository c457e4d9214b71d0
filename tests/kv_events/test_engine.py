"""A real engine publishes what its cache holds, under the hashes that its router asks for."""

import zmq

from quire import LLM, SamplingParams
from quire.kv_events.messages import AllBlocksCleared, BlockRemoved, BlockStored, Event, decode_events, low_bits
from quire.server.handover import block_hashes
from tests.kv_events.test_publisher import free_ports


def test_an_engine_publishes_its_blocks() -> None:
    port, _ = free_ports()
    prompt = list(range(100, 140))
    with zmq.Context() as context, context.socket(zmq.SUB) as reader:
        reader.linger = 0
        reader.subscribe(b"")
        reader.connect(f"tcp://127.0.0.1:{port}")
        llm = LLM(kv_events_config={"endpoint": f"tcp://*:{port}"}, kv_cache_memory="4MiB", max_model_len=128)

        def events_after(action: str) -> list[Event]:
            llm.reset_prefix_cache() if action == "reset" else llm.generate(
                [{"prompt_token_ids": prompt}], SamplingParams(max_tokens=2, temperature=0.0), use_tqdm=False
            )
            events: list[Event] = []
            while reader.poll(500):
                events += decode_events(reader.recv_multipart()[2])
            return [event for event in events if not isinstance(event, AllBlocksCleared)]

        while not (stored := events_after("generate")):  # until the subscription has reached the publisher
            events_after("reset")
        (event,) = stored
        assert isinstance(event, BlockStored)
        assert event.token_ids == prompt[:32]
        data = block_hashes(prompt, 16, "")
        assert event.block_hashes == [low_bits(data[:8]), low_bits(data[8:])]
        assert events_after("generate") == []
        (event,) = events_after("reset")
        assert isinstance(event, BlockRemoved)
        assert sorted(map(low_bits, event.block_hashes)) == sorted((low_bits(data[:8]), low_bits(data[8:])))
        llm.close()
