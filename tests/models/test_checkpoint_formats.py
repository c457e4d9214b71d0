"""The table of checkpoint formats: a format is a file and a row, and nothing else changes."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quire.layers.linear import LinearWeight
from quire.models.checkpoint_formats import CHECKPOINT_FORMATS, CheckpointFormat, open_checkpoint
from quire.models.weights import WeightScope, take_float_linear
from tests.checkpoints import make_checkpoint
from tests.paged_model import PagedModel


class ToyWeights:
    """A source for files that torch.save wrote; layers are stored as [inputs, outputs], negated."""

    activation_dtype = torch.float32

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    @classmethod
    def open(cls, folder: Path) -> "ToyWeights":
        return cls(torch.load(folder / "weights.toy"))

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert self._tensors[name].shape == shape
        return self._tensors[name]

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        if f"{name}.weight" in self._tensors:  # a table of embeddings
            return LinearWeight(self._tensors[f"{name}.weight"])
        stored = self._tensors[f"{name}.negated"].t()
        assert stored.shape == shape
        return LinearWeight(-stored)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        pass


@pytest.mark.parametrize("name", CHECKPOINT_FORMATS)
def test_every_row_names_a_class(name: str) -> None:
    module, class_name = CHECKPOINT_FORMATS[name].source.split(":")
    assert getattr(import_module(module), class_name).open


def test_a_format_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    file = folder / "model.safetensors"
    stored = {}
    for name, tensor in load_file(file).items():
        if name.endswith(("_proj.weight", "lm_head.weight")):
            stored[name.replace(".weight", ".negated")] = -tensor.t()
        else:
            stored[name] = tensor
    torch.save(stored, folder / "weights.toy")
    file.unlink()
    row = CheckpointFormat(f"{__name__}:ToyWeights", ("weights.toy",))
    monkeypatch.setitem(CHECKPOINT_FORMATS, "toy", row)
    assert isinstance(open_checkpoint(folder), ToyWeights)
    torch.testing.assert_close(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_layers_of_floats(transposed: bool, tmp_path: Path) -> None:
    source = open_checkpoint(make_checkpoint(tmp_path, "gpt2"))
    stored = WeightScope(source).scope("transformer").scope("h.0.attn")
    weight = stored.take("c_proj.weight", (64, 64))
    layer = take_float_linear(source, "transformer.h.0.attn.c_proj", (64, 64), bias=True, transposed=transposed)
    assert torch.equal(layer.weight, weight.t() if transposed else weight)
    assert layer.bias is not None
    assert torch.equal(layer.bias, stored.take("c_proj.bias", (64,)))
    assert stored.take_linear("c_proj", (64, 64)).bias is None
