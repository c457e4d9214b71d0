"""Reads images in a process of its own: `python -m quire.engine.image_process FD`.

Started by `ImageReader`. Images come from clients and are read by a large library of C code. The system ends this
process if one image takes too much CPU time, and gives it no more than `MAX_BYTES` of memory.
"""

import os
import resource
import socket
import sys
from hashlib import blake2b

import numpy as np

from quire.engine.group_signals import leave_to_parent
from quire.engine.messages import (
    DecodeImage,
    FrameBuffer,
    ImageAnswer,
    PrepareImages,
    decode_to_image_process,
    encode,
)
from quire.errors import RequestError
from quire.image_input import ImagePart, ImagePixels, ReadImage
from quire.images.decoding import decode, load_readers
from quire.images.families import family_of
from quire.images.layout import ImageFamily
from quire.images.picture import Picture, size_of

MAX_CPU_SECONDS = 2
"""CPU time of one image, up to a second more: the limit is in whole seconds."""
MAX_BYTES = 3 * 2**29
"""Address space of the process."""


def main(fd: int) -> None:
    leave_to_parent()
    _limit(resource.RLIMIT_AS, MAX_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    connection = socket.socket(fileno=fd)
    frames = FrameBuffer()
    family: ImageFamily | None = None
    max_pixels = 0
    while data := connection.recv(1 << 20):
        for body in frames.feed(data):
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + MAX_CPU_SECONDS)
            match decode_to_image_process(body):
                case PrepareImages(vision, max_pixels):
                    family, answer = family_of(vision), _prepare()
                case DecodeImage(content):
                    assert family is not None, "PrepareImages comes first"
                    answer = _read(family, content, max_pixels)
            connection.sendall(encode(answer))


def _prepare() -> ImageAnswer:
    """Import the library now, not with the first image."""
    try:
        load_readers()
    except ImportError:
        return ImageAnswer(
            error="images need the library Pillow, which the server lacks: pip install 'quire-llm[images]'",
            code="no_images",
        )
    return ImageAnswer()


def _read(family: ImageFamily, data: bytes, max_pixels: int) -> ImageAnswer:
    try:
        picture = decode(data, max_pixels)
        return ImageAnswer(read_picture(family, picture))
    except RequestError as error:
        return ImageAnswer(error=error.message, code=error.code)
    except (MemoryError, RecursionError):
        return ImageAnswer(error="the image takes too much memory; send a smaller one", code="image_too_large")


def read_picture(family: ImageFamily, picture: Picture) -> ReadImage:
    """The picture as its encoder reads it."""
    height, width = size_of(picture)
    layout = family.layout((height, width))
    parts = []
    for tiles, num_tokens in zip(family.parts(picture), layout.part_lengths, strict=True):
        stacked = np.stack([np.asarray(tile) for tile in tiles])
        num_tiles, tile_height, tile_width, _ = stacked.shape
        pixels = ImagePixels(stacked.tobytes(), num_tiles, tile_height, tile_width, (height, width))
        shape = f"{stacked.shape},{height},{width};".encode()
        content_hash = blake2b(shape + pixels.data, digest_size=32).digest()
        parts.append(ImagePart(content_hash, num_tokens, pixels))
    return ReadImage(layout.pieces, tuple(parts))


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
