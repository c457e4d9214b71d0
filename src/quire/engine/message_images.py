"""The images of messages: where they stand, and the bytes that stand for them.

A part of a message that is an image names it in one of the ways that clients know: OpenAI's `image_url`, its newer
`input_image`, transformers' `image`, vLLM's `image_pil`. A template sees `{"type": "image"}` in its place.
"""

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from quire.errors import RequestError
from quire.image_input import IMAGE_PART

_KINDS = {
    "image_url": ("image_url",),
    "input_image": ("image_url",),
    "image": ("image", "url", "path", "image_url"),
    "image_pil": ("image_pil",),
}
"""Type of a part → its fields that may name the image."""


def take_images(messages: Sequence[Any], marker: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with a plain part in the place of each image, and what names the images, in their order. `marker`
    stands for an image where a template takes texts only. Raises `RequestError` for a part that names none."""
    plain, sources = [], []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list) or not any(map(is_image, content)):
            plain.append(dict(message))
            continue
        parts: list[Any] = []
        for number, part in enumerate(content):
            if is_image(part):
                sources.append(_source(part, f"messages[{index}].content[{number}]"))
                part = {"type": IMAGE_PART, "marker": marker}
            parts.append(part)
        plain.append({**message, "content": parts})
    return plain, sources


def is_image(part: object) -> bool:
    """Whether a part of a message is an image."""
    return isinstance(part, Mapping) and isinstance(kind := part.get("type"), str) and kind in _KINDS


def has_images(messages: Sequence[Any]) -> bool:
    """Whether any part of the messages is an image."""
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    return any(isinstance(content, list) and any(map(is_image, content)) for content in contents)


def _source(part: Mapping[str, Any], place: str) -> Any:
    for name in _KINDS[part["type"]]:
        value = part.get(name)
        if isinstance(value, Mapping):
            value = value.get("url")
        if value is not None:
            return value
    raise RequestError(f"{place} is an image without {' or '.join(_KINDS[part['type']])}", param="messages")


def data_url_bytes(url: str) -> bytes:
    """The bytes of a data URL. Raises `RequestError` for one that cannot be read."""
    head, comma, body = url.partition(",")
    if not comma:
        raise RequestError("a data URL has no comma between its type and its data", param="messages")
    kind = head.removeprefix("data:").partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise RequestError(f"a data URL holds {kind[:50]}; give an image", param="messages", code="invalid_image")
    if head.rstrip().lower().endswith(";base64"):
        return base64_bytes(body)
    return unquote_to_bytes(body)


def base64_bytes(text: str) -> bytes:
    """The bytes of an image as base64, of either alphabet, with or without line breaks and padding."""
    compact = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            "an image is no base64; give a data URL such as data:image/png;base64,…",
            param="messages",
            code="invalid_image",
        ) from None


def local_bytes(source: object) -> bytes:
    """The bytes of an image that a program in this process gives: an object of Pillow, bytes, a path, or a data URL.
    Raises `RequestError`."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str) and source.startswith("data:"):
        return data_url_bytes(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise RequestError("LLM fetches no images; download it and give its path or its bytes", param="messages")
    if isinstance(source, str | Path):
        path = Path(os.path.expanduser(str(source).removeprefix("file://")))
        try:
            return path.read_bytes()
        except OSError as error:
            raise RequestError(f"the image {path} cannot be read: {error.strerror}", param="messages") from None
    if callable(getattr(source, "save", None)) and callable(getattr(source, "convert", None)):
        buffer = io.BytesIO()
        # Without loss, and with little work: the file lives for a moment.
        source.convert("RGB").save(buffer, format="PNG", compress_level=0)  # type: ignore[attr-defined]  # Pillow's
        return buffer.getvalue()
    raise RequestError(
        f"an image is given as a {type(source).__name__}; give a Pillow image, bytes, a path or a data URL",
        param="messages",
    )
