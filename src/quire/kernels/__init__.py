"""The operations torch has nothing good for: paged attention, KV writes and the small fused steps around them."""

from quire.kernels.interface import AttentionPlan, Kernels

__all__ = ["AttentionPlan", "Kernels", "kernels_for"]


def kernels_for(device_type: str) -> Kernels:
    """The kernel module of a device, imported only when asked for. Call it once, at start."""
    if device_type == "cpu":
        import quire.kernels.cpu as cpu

        return cpu
    if device_type == "cuda":
        import quire.kernels.triton as triton

        return triton
    raise ValueError(f"no kernels for device type {device_type!r}; there are kernels for 'cpu' and 'cuda'")
