"""Arrays that travel in one copy arrive as they were, at addresses that vector loads want."""

import numpy as np
import pytest
import torch

from quire.kernels import transfer

CPU = torch.device("cpu")
ARRAYS = {
    "ids": np.arange(5, dtype=np.int32),
    "none": np.zeros(0, dtype=np.int64),
    "matrix": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "last": np.array([7], dtype=np.float32),
}


def test_arrays_arrive_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    def copied(array: np.ndarray, device: torch.device) -> torch.Tensor:
        copies.append(array.nbytes)
        return torch.from_numpy(array.copy())

    monkeypatch.setattr(transfer, "to_device", copied)
    for device in (torch.device("meta"), CPU):
        sent = transfer.send(ARRAYS, device)
        for name, array in ARRAYS.items():
            assert np.array_equal(sent[name].numpy(), array)
    assert len(copies) == 1


def test_fixed_arrays_are_padded() -> None:
    fixed = transfer.FixedArrays({"ids": np.int32(-1), "weights": np.float64(0.5), "rows": np.int64(9)}, 7, CPU)
    before = fixed.first(7)
    assert all(view.data_ptr() % 16 == 0 for view in before.values())
    for count in (7, 2, 0):
        fixed.send({"ids": np.arange(count, dtype=np.int32), "weights": np.ones(count)})
        views = fixed.first(5)
        assert views["ids"].tolist() == [*range(count), -1, -1, -1, -1, -1][:5]
        assert views["weights"].tolist() == [*[1.0] * count, *[0.5] * 5][:5]
        assert views["rows"].tolist() == [9] * 5
        assert views["rows"].data_ptr() == before["rows"].data_ptr()
    with pytest.raises(AssertionError, match="ids: expected int32, found int64"):
        fixed.send({"ids": np.arange(3)})


def test_what_a_gpu_reads_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from other memory waits for the device."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    array = np.arange(3)
    assert np.array_equal(transfer.staged(array, torch.device("cuda")).numpy(), array)
    assert len(pinned) == 1
    transfer.staged(array, CPU)
    assert len(pinned) == 1


@pytest.mark.parametrize(("device", "waits"), [("mps", True), ("meta", False)])
def test_a_copy_that_would_outlive_its_source_is_waited_for(
    device: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[dict[str, bool]] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, target, **options: copies.append(options))
    transfer.to_device(np.zeros(3), torch.device(device))
    assert copies == [{"non_blocking": not waits}]
