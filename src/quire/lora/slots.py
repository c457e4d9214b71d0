"""AdapterSlots: adapters in memory, each in a slot of the model's layers.

An adapter is checked against the model before a byte of its tensors is read. Loading writes to a slot that no row uses,
so it may run in a thread beside the steps.
"""

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.kernels import Kernels
from quire.layers.adapters import AdaptedLinear, EmbeddingUpdate, LoraUpdate, ModelAdapters
from quire.layers.linear import Linear, LinearWeight
from quire.lora.adapter_folder import AdapterFolder, ModuleTensors, digest_of
from quire.lora.adapter_tensors import AdapterTensors

_Sites = dict[str, list[tuple[AdaptedLinear, int]]]
"""Module → the layers that compute it, and which part of each."""


class AdapterSlots:
    """The slots of one model. The caller of `load` knows which slot is free."""

    def __init__(
        self, adapters: ModelAdapters, kernels: Kernels, *, dtype: torch.dtype, device: torch.device, memory: int
    ) -> None:
        """`dtype` is that of the activations; `memory` the most bytes that adapters may take."""
        self.adapters = adapters
        self._kernels = kernels
        self._dtype = dtype
        self._device = device
        self._memory = memory
        if adapters.embedding is None:  # a model that makes no logits
            adapters.embedding_name = ""
        self._slots: dict[str, int] = {}
        self._sites: _Sites = {}
        for linear in adapters.linears:
            for index, part in enumerate(linear.parts):
                if part.origin is not None:
                    self._sites.setdefault(part.origin.name, []).append((linear, index))
        self._names = {name.partition(".")[2]: name for name in [*self._sites, adapters.embedding_name]}
        """Names without their first part, as adapters of a model without its head have them."""

    def __len__(self) -> int:
        return self.adapters.num_slots

    def slot_of(self, digest: str) -> int:
        """The slot of a loaded adapter; −1 for the empty digest, the model alone."""
        return self._slots[digest] if digest else -1

    def check(self, path: str) -> AdapterFolder:
        """The adapter in a folder, if it fits the model. Raises `CheckpointError`."""
        folder = AdapterFolder.open(path)
        if folder.max_rank > self.adapters.max_rank:
            raise CheckpointError(
                f"adapter {path!r} has rank {folder.max_rank}, the limit is {self.adapters.max_rank} (max_lora_rank); "
                "start with a higher one"
            )
        modules = {self._own_name(path, name): module for name, module in folder.modules.items()}
        for name, module in modules.items():
            self._check_module(path, name, module)
        left_out = [name for name in self._sites if name not in modules and folder.config.changes(name)]
        if left_out and folder.config.targets != "all-linear":
            raise CheckpointError(
                f"adapter {path!r} has no tensors of {left_out[0]}, although target_modules names it; save the adapter "
                "again"
            )
        return folder

    def load(self, path: str, digest: str, slot: int) -> None:
        """Put the adapter with this digest into a slot. Raises `CheckpointError`, and then leaves the slot empty."""
        folder = self.check(path)
        tensors = AdapterTensors(folder)
        if digest_of(folder.path) != digest:
            raise CheckpointError(f"adapter {path!r} has changed since it was asked for; send the request again")
        self.clear(slot)
        try:
            self._place(folder, tensors, slot)
        except BaseException:
            self.adapters.clear(slot)
            raise
        self._slots[digest] = slot

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self._slots = {digest: used for digest, used in self._slots.items() if used != slot}
        self.adapters.clear(slot)

    # -- checking -----------------------------------------------------------------------------------------------------

    def _own_name(self, path: str, name: str) -> str:
        known = name in self._sites or name in (self.adapters.embedding_name, self.adapters.head_name)
        name = name if known else self._names.get(name, name)
        if name in self._sites or name == self.adapters.embedding_name:
            return name
        raise CheckpointError(
            f"adapter {path!r} changes {name[:200]}, which no adapter can change in this model; there are "
            f"{', '.join(sorted({site.rpartition('.')[2] for site in self._sites}))}, and the embeddings"
        )

    def _check_module(self, path: str, name: str, module: ModuleTensors) -> None:
        is_embedding = name == self.adapters.embedding_name
        if module.weight is not None:
            if not is_embedding and name != self.adapters.head_name:
                raise CheckpointError(
                    f"adapter {path!r} brings a whole weight of {name[:200]} (modules_to_save); that is supported for "
                    f"{self.adapters.embedding_name} and {self.adapters.head_name} only"
                )
            expected, found = list(self._shape_of(name)), list(module.weight.shape)
            if expected != found:
                raise CheckpointError(
                    f"adapter {path!r}: the weight of {name} is {found}, in this model it is {expected}; an adapter "
                    "with another vocabulary does not fit"
                )
            return
        assert module.a is not None
        assert module.b is not None
        outputs, inputs = self._shape_of(name)
        if is_embedding != module.is_embedding:
            kind = "an embedding" if is_embedding else "a dense layer"
            raise CheckpointError(f"adapter {path!r}: {name} is {kind} in this model, but not in the adapter")
        if is_embedding:
            outputs, inputs = inputs, outputs
        if (module.b.shape[0], module.a.shape[1]) != (outputs, inputs):
            raise CheckpointError(
                f"adapter {path!r}: the update of {name} is [{module.b.shape[0]}, {module.a.shape[1]}], in this model "
                f"the weight is [{outputs}, {inputs}]; it was trained for another base model"
            )

    def _shape_of(self, name: str) -> tuple[int, int]:
        """[outputs, inputs] of a module's stored weight; of the embeddings [vocabulary, width]."""
        if name in self._sites:
            linear, index = self._sites[name][0]
            origin = linear.parts[index].origin
            assert origin is not None
            return origin.num_outputs, linear.num_inputs
        head = self.adapters.head
        assert head is not None
        return head.num_outputs, head.num_inputs

    # -- loading ------------------------------------------------------------------------------------------------------

    def _place(self, folder: AdapterFolder, tensors: AdapterTensors, slot: int) -> None:
        config, changed = folder.config, dict[AdaptedLinear, list[LoraUpdate | None]]()
        for stored_name, module in folder.modules.items():
            name = self._own_name(str(folder.path), stored_name)
            if module.weight is not None:
                self._replace(name, tensors.take(module.weight), slot, folder)
                continue
            assert module.a is not None
            assert module.b is not None
            a, b = tensors.take(module.a).float(), tensors.take(module.b).float() * config.factor_of(stored_name)
            if module.is_embedding:
                assert self.adapters.embedding is not None
                placed = tuple(x.t().contiguous().to(self._device, self._dtype) for x in (a, b))
                self.adapters.embedding.updates[slot] = EmbeddingUpdate(placed)
                continue
            magnitude = None if module.magnitude is None else tensors.take(module.magnitude).float()
            for linear, index in self._sites[name]:
                updates = changed.setdefault(linear, [None] * len(linear.parts))
                updates[index] = LoraUpdate(a, b, magnitude)
        for linear, updates in changed.items():
            linear.load(slot, updates, self._dtype, self._device)

    def _replace(self, name: str, weight: Tensor, slot: int, folder: AdapterFolder) -> None:
        """Let a whole weight stand in for the embeddings or the head."""
        dtype = str(self._dtype).removeprefix("torch.")
        num_bytes = weight.numel() * self._dtype.itemsize
        room = self._memory - self.adapters.num_bytes
        if num_bytes > room:
            raise CheckpointError(
                f"adapter {str(folder.path)!r} brings a whole weight of {num_bytes:,} bytes, and the memory of "
                f"adapters has room for {max(0, room):,}; name it with lora_modules at start, or raise max_loras"
            )
        if name == self.adapters.embedding_name:
            assert self.adapters.embedding is not None
            self.adapters.embedding.updates[slot] = EmbeddingUpdate((weight.to(self._device, self._dtype),))
            return
        assert self.adapters.head is not None
        whole = LinearWeight(weight.to(self._device))
        layer = Linear(self._kernels, [whole], dtype)
        layer.bias = self.adapters.head.bias
        self.adapters.head.replace(slot, layer)
