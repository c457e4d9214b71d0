"""ImageProcessing: how a model's images are resized and normalised, as its preprocessor_config.json says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quire.errors import CheckpointError
from quire.model_config.config_json import is_positive, read_json

Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)

_RESAMPLES = (0, 1, 2, 3, 4, 5)
"""Pillow's filters: nearest, lanczos, bilinear, bicubic, box, hamming."""


class TargetSize(NamedTuple):
    """What a resize leads to, in Hugging Face's words; 0 stands for what is not said. Qwen gives areas as edges."""

    shortest_edge: int = 0
    longest_edge: int = 0
    height: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessing:
    """What happens to an image before its encoder reads it. Sizes are in pixels."""

    size: TargetSize
    crop: tuple[int, int] | None = None
    """(height, width) cut out of the middle after the resize; None: nothing is cut off."""
    resample: int = 3
    """Pillow's filter."""
    factor: float = 1 / 255
    """A value is multiplied by it, and then normalised."""
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    pads_to_square: bool = False
    """The image is first padded with the mean to a square (LLaVA 1.5 as it was trained)."""
    splits: bool = False
    """A large image is cut into tiles (Idefics3)."""
    tile: int = 0
    """Height and width of a tile."""


def read_processing(folder: Path, defaults: dict[str, Any]) -> ImageProcessing:
    """The processing that a folder's files say, over a family's `defaults`, which are in the words of these files.

    Raises `CheckpointError` for what is not supported.
    """
    path, found = _read_file(folder)
    found = {key: value for key, value in found.items() if value is not None}
    values = {**defaults, **found}
    size = _size(path, "size", values["size"], found, values)
    crop = None
    if values.get("do_center_crop"):
        cropped = _size(path, "crop_size", values["crop_size"], {}, {})
        crop = (cropped.height or cropped.shortest_edge, cropped.width or cropped.shortest_edge)
    for flag in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not values.get(flag, True):
            raise _refusal(path, flag, values[flag], "true")
    for flag in ("do_pan_and_scan",):
        if values.get(flag):
            raise _refusal(path, flag, values[flag], "false")
    resample = values["resample"]
    if resample not in _RESAMPLES or isinstance(resample, bool):
        raise _refusal(path, "resample", resample, "the number of one of Pillow's filters, 0 to 5")
    kind = str(values.get("image_processor_type", ""))
    factor = values.get("rescale_factor", 1 / 255)
    if not is_positive(factor):
        raise _refusal(path, "rescale_factor", factor, "a positive number")
    return ImageProcessing(
        size=size,
        crop=crop,
        resample=resample,
        factor=float(factor),
        mean=_triple(path, "image_mean", values["image_mean"]),
        std=_triple(path, "image_std", values["image_std"]),
        pads_to_square=bool(values.get("do_pad")) and kind.startswith("LlavaImageProcessor"),
        splits=bool(values.get("do_image_splitting")),
        tile=_size(path, "max_image_size", values.get("max_image_size", 1), {}, {}).longest_edge,
    )


def _read_file(folder: Path) -> tuple[Path, dict[str, Any]]:
    """preprocessor_config.json, or the part of processor_config.json in which newer files keep it."""
    path = folder / "processor_config.json"
    if path.is_file() and isinstance(inner := read_json(path).get("image_processor"), dict):
        return path, inner
    path = folder / "preprocessor_config.json"
    return path, read_json(path) if path.is_file() else {}


def _size(path: Path, name: str, value: Any, found: dict[str, Any], values: dict[str, Any]) -> TargetSize:
    """A size as an object; a number stands for an edge. `min_pixels` and `max_pixels` are Qwen's old words for the
    bounds of an area."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"longest_edge" if name == "max_image_size" else "shortest_edge": value}
    if isinstance(value, dict):
        value = dict(value)
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if old in values and (old in found or new not in value):
                value[new] = values[old]
            value.pop(old, None)
        value = {key: edge for key, edge in value.items() if edge is not None}
    if (
        not isinstance(value, dict)
        or not value
        or not all(key in TargetSize._fields and type(edge) is int and 0 < edge <= 2**31 for key, edge in value.items())
        or ("height" in value) != ("width" in value)
    ):
        raise _refusal(path, name, value, "an object with shortest_edge, longest_edge, or height and width")
    return TargetSize(**value)


def _triple(path: Path, name: str, value: Any) -> Triple:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = [value] * 3
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(
            isinstance(entry, int | float) and not isinstance(entry, bool) and (entry or name == "image_mean")
            for entry in value
        )
    ):
        raise _refusal(path, name, value, "three numbers, for red, green and blue")
    return (float(value[0]), float(value[1]), float(value[2]))


def _refusal(path: Path, name: str, value: Any, supported: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} is {json.dumps(value)[:200]}; supported: {supported}")
