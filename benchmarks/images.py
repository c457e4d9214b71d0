"""What a prompt with images costs its neighbours: `python -m benchmarks.images`.

Two streams decode, then a request with images comes. Prints the milliseconds between the tokens of the streams until
its first token, and without it: as many steps before as after, since the machine may change meanwhile. The model is an
image encoder of SmolVLM's width beside a decoder of some layers, with random weights. Prints JSON.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from quire import SamplingParams
from quire.config import EngineConfig
from quire.engine.engine import Engine
from tests.vision_checkpoints import edit_json, make_vision_checkpoint, random_image

NUM_STREAMS = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12, help="layers of the decoder")
    parser.add_argument("--tower-layers", type=int, default=12)
    parser.add_argument("--side", type=int, default=256, help="pixels of an image in each direction")
    parser.add_argument(
        "--before", type=int, default=80, help="steps that are measured before the request comes, and after"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), arguments)
        options: dict[str, Any] = {"num_blocks": 1024, "max_num_seqs": 8, "max_model_len": 4096}
        config = EngineConfig(model=folder, load_format="dummy", threads=arguments.threads, **options)
        engine = Engine(config, lambda line: None)
        images = [random_image(arguments.side, arguments.side, seed) for seed in range(arguments.images)]
        prompt = {"prompt": "<image> and " * len(images), "multi_modal_data": {"image": images}}
        start_streams(engine)
        for _ in range(10):
            engine.step()
        without = [timed_step(engine) for _ in range(arguments.before)]
        asked = engine.add_request("images", prompt, SamplingParams(max_tokens=1, temperature=0))
        during = []
        while not asked.finished:
            during.append(timed_step(engine))
        without += [timed_step(engine) for _ in range(arguments.before)]
        figures = {"without": summary(without), "until the first token": summary(during)}
        ratio = figures["until the first token"]["p99"] / figures["without"]["p99"]
        print(json.dumps({**figures, "ratio of p99": round(ratio, 2), "load average": os.getloadavg()}), flush=True)
        engine.close()


def make_model(folder: Path, arguments: argparse.Namespace) -> None:
    """The files of a model without its weights."""
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    text |= {"num_hidden_layers": arguments.layers, "max_position_embeddings": 4096}
    make_vision_checkpoint(folder, "idefics3")
    (folder / "model.safetensors").unlink()
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16}
    tower |= {"num_hidden_layers": arguments.tower_layers, "image_size": arguments.side}
    edit_json(folder / "config.json", text_config=text, vision_config=tower, scale_factor=4)
    edges = {"size": {"longest_edge": arguments.side}, "max_image_size": {"longest_edge": arguments.side}}
    edit_json(folder / "preprocessor_config.json", **edges)


def start_streams(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
    for index in range(NUM_STREAMS):
        engine.add_request(f"stream {index}", f"Stream {index}", params)


def timed_step(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return (time.perf_counter() - started) * 1e3


def summary(times: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times, (50, 99))
    return {"steps": len(times), "p50": round(p50, 1), "p99": round(p99, 1), "most": round(max(times), 1)}


if __name__ == "__main__":
    main()
