"""Run by the Python of an environment with vLLM: its own publisher sends events, and its own classes read Quire's.

    python vllm_program.py PORT REPLAY_PORT QUIRE_PORT QUIRE_REPLAY_PORT

Prints one JSON object, and publishes until a line comes; then the cache is cleared.
"""

# mypy: ignore-errors
import json
import select
import sys

import msgspec
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import kv_cache_utils

TOPIC = "kv@10.0.0.1:8000@m"
WINDOW = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 4}
WHOLE = {"group_idx": 0, "kv_cache_spec_kind": "full_attention", "extra_keys": [None, ("salt",)], "session_id": "s"}


def stored(hashes, **fields):
    return BlockStored(
        block_hashes=hashes, parent_block_hash=None, token_ids=[0] * (2 * len(hashes)), block_size=2, lora_id=None,
        medium=fields.pop("medium", "GPU"), lora_name=None, **fields,
    )  # fmt: skip


def main(port, replay_port, quire_port, quire_replay_port):
    publisher = ZmqEventPublisher(0, f"tcp://*:{port}", f"tcp://*:{replay_port}", topic=TOPIC)
    # The first messages go out before anybody can have subscribed: they are read by replay.
    publisher.publish(KVEventBatch(ts=1.0, events=[stored([1, b"\x00" * 24 + (2).to_bytes(8, "big")], **WHOLE)]))
    publisher.publish(KVEventBatch(ts=2.0, events=[stored([1, 2, 3], **WINDOW), BlockRemoved([1], "GPU", 1)]))
    publisher.publish(KVEventBatch(ts=3.0, events=[stored([9], medium="CPU", **{**WHOLE, "extra_keys": None})]))
    print(json.dumps(read_quire(quire_port, quire_replay_port)), flush=True)
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        publisher.publish(KVEventBatch(ts=4.0, events=[stored([100], **{**WHOLE, "extra_keys": None})]))
    sys.stdin.readline()
    publisher.publish(KVEventBatch(ts=5.0, events=[AllBlocksCleared()]))
    sys.stdin.read()  # until it has been read
    publisher.shutdown()


def read_quire(port, replay_port):
    """Quire's events as vLLM's classes decode them, live and by replay, and vLLM's hashes of the same tokens."""
    decoder = msgspec.msgpack.Decoder(type=KVEventBatch)
    context = zmq.Context()
    reader, replay = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    reader.subscribe(TOPIC.encode())
    reader.connect(f"tcp://127.0.0.1:{port}")
    topic, number, content = reader.recv_multipart()
    live = [topic.decode(), msgspec.to_builtins(decoder.decode(content))]
    replay.connect(f"tcp://127.0.0.1:{replay_port}")
    replay.send_multipart((b"", (0).to_bytes(8, "big")))
    past = []
    while True:
        _delimiter, topic, number, content = replay.recv_multipart()
        if number == ZmqEventPublisher.END_SEQ:
            break
        past.append([topic.decode(), int.from_bytes(number, "big"), msgspec.to_builtins(decoder.decode(content))])
    kv_cache_utils.init_none_hash(sha256_cbor)
    first = kv_cache_utils.hash_block_tokens(sha256_cbor, None, [1, 2, 3, 4])
    second = kv_cache_utils.hash_block_tokens(sha256_cbor, first, [5, 6, 70000, 8])
    return {"live": live, "past": past, "hashes": [bytes(first).hex(), bytes(second).hex()]}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
