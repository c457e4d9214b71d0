"""Folders of adapters: what peft writes is read, everything else is refused by its name."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quire.errors import CheckpointError
from quire.lora.adapter_config import AdapterConfig
from quire.lora.adapter_folder import CONFIG_FILE, TENSORS_FILE, AdapterFolder

Q = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
TENSORS = {f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(6, 2)}


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """The smallest adapter, with other tensors and other keys; a key of None is left out."""
    folder.mkdir(exist_ok=True)
    content = {key: value for key, value in (CONFIG | config).items() if value is not None}
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    named = {f"base_model.model.{name}": tensor for name, tensor in (TENSORS if tensors is None else tensors).items()}
    save_file(named, folder / TENSORS_FILE)
    return folder


def read(folder: Path, **config: Any) -> AdapterConfig:
    return AdapterConfig.read(write(folder, **config))


def test_the_smallest_adapter(tmp_path: Path) -> None:
    adapter = AdapterFolder.open(write(tmp_path / "a"))
    assert list(adapter.modules) == [Q]
    assert adapter.max_rank == 2
    assert adapter.config.factor_of(Q) == 2.0


def test_factors(tmp_path: Path) -> None:
    config = read(
        tmp_path / "a",
        rank_pattern={"q_proj": 4, r"layers\.1\.mlp\..*": 16, "^model.layers.2.mlp.up_proj": 3},
        alpha_pattern={"o_proj": 1},
    )
    ranks = {Q: 4, "model.layers.1.mlp.up_proj": 16, "model.layers.2.mlp.up_proj": 3, "model.layers.11.mlp.up_proj": 2}
    assert {module: config.rank_of(module) for module in ranks} == ranks
    assert config.factor_of(Q) == 1.0
    assert config.factor_of("model.layers.0.self_attn.o_proj") == 0.5
    assert read(tmp_path / "a", use_rslora=True, r=16, lora_alpha=4).factor_of(Q) == 1.0


@pytest.mark.parametrize(
    ("config", "changed", "left"),
    [
        ({}, [Q, "q_proj"], ["model.layers.0.self_attn.eq_proj", "model.layers.0.self_attn.k_proj"]),
        ({"target_modules": ["self_attn.q_proj"]}, [Q], ["model.layers.0.cross_attn.q_proj"]),
        ({"target_modules": r".*\.(0|2)\..*\.(q|k)_proj"}, [Q, Q.replace("0", "2")], [Q.replace("0", "1")]),
        ({"layers_to_transform": [1, 3]}, [Q.replace("0", "3")], [Q, Q.replace("0", "13")]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, [Q], [Q.replace("layers", "blocks")]),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "layers"]}, [Q, "x.h.0.q_proj"], ["x.h.1.q_proj"]),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, [Q.replace("0", "1")], [Q]),
        ({"exclude_modules": r".*0.*"}, [Q.replace("0", "1")], [Q]),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]}, [Q], ["lm_head"]),
        ({"target_modules": "all-linear"}, [Q, "anything"], []),
    ],
    ids=str,
)
def test_modules(config: dict[str, Any], changed: list[str], left: list[str], tmp_path: Path) -> None:
    found = read(tmp_path / "a", **config)
    assert [name for name in (*changed, *left) if found.changes(name)] == changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"x": 1}),
        ("arrow_config", {"top_k": 1}),
        ("ensure_weight_tying", True),
        ("megatron_config", {"x": 1}),
        ("something_new", True),
        ("r", 0),
        ("r", -4),
        ("r", True),
        ("r", 4.0),
        ("r", "8"),
        ("r", 10**9),
        ("lora_alpha", 0),
        ("lora_alpha", 1e300),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", "16"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"q_proj": float("-inf")}),
        ("alpha_pattern", {"(a+)+": 1}),
        ("target_modules", []),
        ("target_modules", [""]),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", "(.*)*q_proj"),
        ("target_modules", "(a|a)+b"),
        ("target_modules", "(?:x{1,9}){2,}"),
        ("target_modules", ".*.*.*.*.*.*q_proj"),
        ("target_modules", r"(.)\1"),
        ("target_modules", "["),
        ("target_modules", "q" * 5000),
        ("layers_to_transform", "all"),
        ("layers_to_transform", [0.5]),
        ("layers_pattern", "(x+)+"),
        ("modules_to_save", "lm_head"),
        ("use_dora", "yes"),
        ("use_rslora", 1),
    ],
    ids=str,
)
def test_unsupported_configs_name_the_key(key: str, value: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", **{key: value})
    with pytest.raises(CheckpointError, match=rf"{CONFIG_FILE}: {key} is .*; supported: .+"):
        AdapterFolder.open(folder)


def test_hostile_patterns_end_soon(tmp_path: Path) -> None:
    """What is let through takes little time, whatever the name of the module."""
    config = read(tmp_path / "a", target_modules=".*.*.*.*.*!")
    started = time.monotonic()
    assert not config.changes("model.layers.10.self_attn.q_proj")
    assert time.monotonic() - started < 10


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
BAD_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no B": ({A: torch.ones(2, 8)}, f"{Q} has no lora_B"),
    "no A": ({B: torch.ones(6, 2)}, f"{Q} has no lora_A"),
    "rank of A": ({A: torch.ones(3, 8), B: torch.ones(6, 3)}, "gives it rank 2"),
    "rank of B": ({A: torch.ones(2, 8), B: torch.ones(6, 3)}, "gives it rank 2"),
    "rank 0": ({A: torch.ones(0, 8), B: torch.ones(6, 0)}, "gives it rank 2"),
    "vector": ({A: torch.ones(8), B: torch.ones(6, 2)}, "gives it rank 2"),
    "convolution": ({A: torch.ones(2, 8, 1, 1), B: torch.ones(6, 2, 1, 1)}, "gives it rank 2"),
    "integers": (TENSORS | {A: torch.ones(2, 8, dtype=torch.int8)}, "is I8; there is F32, F16, BF16"),
    "a bias": (TENSORS | {f"{Q}.bias": torch.ones(6)}, f"tensor base_model.model.{Q}.bias is not supported"),
    "a bias of B": (TENSORS | {f"{Q}.lora_B.bias": torch.ones(6)}, "is not supported"),
    "DoRA": (TENSORS | {f"{Q}.lora_magnitude_vector": torch.ones(6)}, "a magnitude without use_dora"),
    "both": (TENSORS | {f"{Q}.weight": torch.ones(6, 8)}, "has both a whole weight and an update"),
    "no target": (
        {name.replace("q_proj", "k_proj"): tensor for name, tensor in TENSORS.items()},
        "k_proj has an update, but adapter_config.json leaves that module out",
    ),
    "an adapter's name": ({f"{Q}.lora_A.default.weight": torch.ones(2, 8)}, "lora_A.default.weight is not supported"),
    "no module": ({".lora_A.weight": torch.ones(2, 8)}, "is not supported"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_fit_the_config(name: str, tmp_path: Path) -> None:
    tensors, expected = BAD_TENSORS[name]
    with pytest.raises(CheckpointError, match=rf"{TENSORS_FILE}: .*{expected}"):
        AdapterFolder.open(write(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (TENSORS, "no lora_magnitude_vector, but use_dora is true"),
        (TENSORS | {f"{Q}.lora_magnitude_vector": torch.ones(5)}, r"a magnitude \[5\]; lora_B gives \[6\]"),
    ],
)
def test_dora(tensors: dict[str, Tensor], expected: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=expected):
        AdapterFolder.open(write(tmp_path / "a", tensors, use_dora=True))
    embedding = {"model.embed_tokens.lora_embedding_A": torch.ones(2, 8)}
    embedding |= {"model.embed_tokens.lora_embedding_B": torch.ones(4, 2)}
    with pytest.raises(CheckpointError, match="DoRA serves dense layers only"):
        AdapterFolder.open(write(tmp_path / "b", embedding, use_dora=True, target_modules=["embed_tokens"]))


def _damage(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def damaged(folder: Path) -> Path:
        change(write(folder))
        return folder

    return damaged


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: None, "is not a folder"),
    "a file": (lambda folder: folder.write_text("x"), "is not a folder"),
    "empty": (lambda folder: folder.mkdir(), f"has no {CONFIG_FILE}; found nothing"),
    "no config": (_damage(lambda f: (f / CONFIG_FILE).unlink()), f"has no {CONFIG_FILE}; found {TENSORS_FILE}"),
    "no tensors": (_damage(lambda f: (f / TENSORS_FILE).unlink()), f"has no {TENSORS_FILE}"),
    "pickled": (
        _damage(lambda f: (f / TENSORS_FILE).rename(f / "adapter_model.bin")),
        "loading pickled files can run code",
    ),
    "no JSON": (_damage(lambda f: (f / CONFIG_FILE).write_text("{")), "cannot be read as JSON"),
    "a list": (_damage(lambda f: (f / CONFIG_FILE).write_text("[]")), "expected an object"),
    "deep JSON": (_damage(lambda f: (f / CONFIG_FILE).write_text('{"a":' + "[" * 10**5)), "cannot be read as JSON"),
    "truncated": (
        _damage(lambda f: (f / TENSORS_FILE).write_bytes((f / TENSORS_FILE).read_bytes()[:-4])),
        "is truncated",
    ),
    "a huge header": (_damage(lambda f: (f / TENSORS_FILE).write_bytes(b"\xff" * 64)), "no valid length"),
    "a pointer": (
        _damage(lambda f: (f / TENSORS_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")),
        "git-lfs",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(name: str, tmp_path: Path) -> None:
    make, expected = BAD_FOLDERS[name]
    make(tmp_path / "a")
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        AdapterFolder.open(tmp_path / "a")


def test_the_digest_is_of_config_and_tensors(tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    folders = [
        write(tmp_path / "a"),
        write(tmp_path / "same"),
        write(tmp_path / "tensors", other),
        write(tmp_path / "config", lora_alpha=5),
    ]
    digests = [AdapterFolder.open(folder).digest() for folder in folders]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
