"""Perplexity of an exported model by OpenVINO, on rows of token ids: `python -m benchmarks.peers.openvino_perplexity
FOLDER ROWS.json`, in OpenVINO's own interpreter.

All tokens of a row but its first are scored. The KV cache has the plugin's default, as in `openvino_pipeline`.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import openvino


def main() -> None:
    folder, file = Path(sys.argv[1]), Path(sys.argv[2])
    properties = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", properties)
    request = compiled.create_infer_request()
    known = {name for port in compiled.inputs for name in port.get_names()}
    total, count = 0.0, 0
    for row in json.loads(file.read_text()):
        ids = np.array([row], dtype=np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(row), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        request.reset_state()
        request.infer({name: value for name, value in inputs.items() if name in known})
        logits = request.get_tensor("logits").data[0].astype(np.float64)
        largest = logits.max(axis=1)
        sums = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest
        total += float((sums[:-1] - logits[np.arange(len(row) - 1), row[1:]]).sum())
        count += len(row) - 1
    print(f"perplexity {math.exp(total / count)}")


if __name__ == "__main__":
    main()
