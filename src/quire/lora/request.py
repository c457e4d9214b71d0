"""LoRARequest: which adapter a prompt of `LLM` is continued with, under vLLM's name and fields."""

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as brief

from quire.errors import RequestError


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter. Its content decides what it is: two names of one folder share the prefix cache, and a folder whose
    files change is another adapter."""

    lora_name: str
    lora_int_id: int
    """vLLM's number of the adapter. It must be above 0 and means nothing here."""
    lora_path: str
    """Folder with adapter_config.json and adapter_model.safetensors."""

    def __post_init__(self) -> None:
        """Raises `RequestError`."""
        for name in ("lora_name", "lora_path"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise RequestError(f"{name} is {value!r}; it must be a text that is not empty", param="lora_request")
        number = self.lora_int_id
        if type(number) is not int or number < 1:
            raise RequestError(f"lora_int_id is {number!r}; it must be an integer from 1", param="lora_request")


def one_for_each(given: LoRARequest | Sequence[LoRARequest | None] | None, count: int) -> Sequence[LoRARequest | None]:
    """One entry for each prompt. Raises `RequestError`."""
    if given is None or isinstance(given, LoRARequest):
        return [given] * count
    if len(given) != count or not all(one is None or isinstance(one, LoRARequest) for one in given):
        raise RequestError(
            f"{count} prompts came with lora_request {brief(given)}; give one LoRARequest, or a list with one or None "
            "for each prompt",
            param="lora_request",
        )
    return given
