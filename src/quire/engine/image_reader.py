"""ImageReader: decodes and resizes images in expendable child processes, and keeps the results of late.

A conversation sends its images with every turn, so what was read a moment ago is found by the hash of the file.
`AsyncImageReader` is the same for a server, whose event loop must not block.
"""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from quire.config import EngineConfig
from quire.engine.expendable import CostlyQuestionError, Expendable
from quire.engine.messages import DecodeImage, ImageAnswer, PrepareImages, decode_from_image_process
from quire.errors import QueueFullError, RequestError
from quire.image_input import ReadImage
from quire.model_config import VisionConfig

ANSWER_SECONDS = 20.0
"""Longest wait for an image, on a machine too busy to use up the CPU time that it may take."""
MAX_WAITING = 256
"""Most images that may wait to be read; the next one is refused with 429."""
MAX_KEPT_BYTES = 64 * 2**20
"""Pixels of images that are kept for later turns."""


class ImageReader:
    """Owns the child process; reads one image at a time. `kill` may be called from another thread."""

    def __init__(self, vision: VisionConfig, *, max_pixels: int, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, ReadImage] = OrderedDict()
        self._num_kept_bytes = 0
        self._process: Expendable[ImageAnswer] = Expendable(
            "quire.engine.image_process",
            "reads images",
            PrepareImages(vision, max_pixels),
            decode_from_image_process,
            seconds=ANSWER_SECONDS,
        )

    @classmethod
    def for_model(cls, config: EngineConfig, vision: VisionConfig) -> "ImageReader":
        """A reader with the limits of the config."""
        return cls(vision, max_pixels=config.max_image_pixels, max_bytes=config.max_image_size)

    def read(self, data: bytes) -> ReadImage:
        """The image in the bytes of a file. Raises `RequestError` if it cannot be read within the limits."""
        if len(data) > self._max_bytes:
            raise RequestError(
                f"an image has {len(data):,} bytes, more than the limit of {self._max_bytes:,} (max_image_size)",
                param="messages",
                code="image_too_large",
            )
        key = blake2b(data, digest_size=32).digest()
        image = self._kept.pop(key, None)
        if image is None:
            image = self._ask(data)
            self._num_kept_bytes += image.num_bytes
        self._kept[key] = image
        while self._num_kept_bytes > MAX_KEPT_BYTES:
            self._num_kept_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return image

    def _ask(self, data: bytes) -> ReadImage:
        first = self._process.start()  # that it does not start is no client's mistake
        try:
            answer = self._process.ask(DecodeImage(data)) if first is None or first.error is None else first
        except CostlyQuestionError as error:
            raise RequestError(
                "the image takes too much time or memory to read; send a smaller one",
                param="messages",
                code="image_too_large",
            ) from error
        if answer.image is None:
            if answer.code == "no_images":
                self._process.close()  # the library may be there the next time
            raise RequestError(answer.error or "the image cannot be read", param="messages", code=answer.code)
        return answer.image

    def kill(self) -> None:
        """End the process; a pending `read` raises `EngineUnavailableError`."""
        self._process.kill()

    def close(self) -> None:
        """End the process. A later `read` starts a new one."""
        self._process.close()


class AsyncImageReader:
    """An `ImageReader` in its own thread; callers queue for it."""

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-image-reader")
        self._num_waiting = 0

    async def read(self, data: bytes) -> ReadImage:
        """`ImageReader.read`. Raises `QueueFullError` if more than `MAX_WAITING` wait."""
        if self._num_waiting >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} images are waiting to be read", retry_after=1)
        self._num_waiting += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(self._reader.read, data))
        finally:
            self._num_waiting -= 1

    async def close(self) -> None:
        """End the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._reader.kill()
        await asyncio.to_thread(self._thread.shutdown)
        self._reader.close()
