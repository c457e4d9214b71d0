"""What a client may send as an image: read in time, or refused with the reason, and the next one is read."""

import base64
import io
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from quire.engine import expendable
from quire.engine.image_reader import ImageReader
from quire.engine.message_images import base64_bytes, data_url_bytes, local_bytes, take_images
from quire.errors import EngineUnavailableError, RequestError
from quire.model_config import ModelConfig
from tests.vision_checkpoints import make_vision_checkpoint, random_image

MAX_PIXELS, MAX_BYTES = 100_000, 200_000


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageReader]:
    folder = make_vision_checkpoint(tmp_path_factory.mktemp("llava"), "llava")
    vision = ModelConfig.from_folder(folder).vision
    assert vision is not None
    reader = ImageReader(vision, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES)
    yield reader
    reader.close()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = random_image(60, 40)
PNG = saved(PICTURE, "PNG")


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    return saved(PICTURE, kind, save_all=True, append_images=[random_image(60, 40, 5)])


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no image"),
    "text": (b"hello", "no image"),
    "html": (b"<html><body>not found</body></html>", "no image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "no image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    "tiff": (saved(PICTURE, "TIFF"), "no image"),
    "zeros": (b"\0" * 4096, "no image"),
    "png cut off": (PNG[: len(PNG) // 2], "broken or cut off"),
    "png header": (PNG[:33], "no image|broken or cut off"),
    "png signature": (PNG[:8], "no image|broken"),
    "jpeg cut off": (saved(PICTURE, "JPEG")[:1200], "no image|broken or cut off"),
    "webp cut off": (saved(PICTURE, "WEBP", lossless=True)[:100], "no image|broken or cut off"),
    "gif cut off": (saved(PICTURE, "GIF")[:900], "broken or cut off"),
    "png of wrong checksums": (PNG[:60] + bytes(9) + PNG[69:], "broken or cut off"),
    "bomb in the header": (
        png_of(60_000, 60_000),
        "^the image has 60000 × 60000 pixels, more than the limit of 100,000",
    ),
    "no pixels": (png_of(0, 0), "no image|broken"),
    "too many bytes": (bytes(MAX_BYTES + 1), r"200,001 bytes, more than the limit of 200,000 \(max_image_size\)"),
    "animated gif": (animation("GIF"), "animation"),
    "animated png": (animation("PNG"), "animation"),
    "animated webp": (animation("WEBP"), "animation"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_time(name: str, reader: ImageReader) -> None:
    data, reason = BAD[name]
    reader.read(PNG)  # the process runs
    started = time.monotonic()
    with pytest.raises(RequestError, match=reason):
        reader.read(data)
    assert time.monotonic() - started < 5  # the system may be busy; what a file can take is limited
    assert reader.read(PNG).parts


def test_a_process_that_ended_is_replaced(reader: ImageReader) -> None:
    reader.read(saved(random_image(8, 8, 1), "PNG"))
    reader.close()
    assert reader.read(saved(random_image(8, 8, 2), "PNG")).parts


def test_a_process_that_does_not_start_is_no_mistake_of_a_client(
    reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.close()
    picture = saved(random_image(8, 8, 3), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(expendable, "START_SECONDS", 0.0)
        patch.setattr(reader._process, "_seconds", 1e-3)
        with pytest.raises(EngineUnavailableError, match="the process that reads images did not answer"):
            reader.read(picture)
    assert reader.read(picture).parts


def test_data_behind_the_pixels_is_not_inflated(reader: ImageReader) -> None:
    bomb = png_of(10, 10, bytes(20_000_000))
    assert len(bomb) < MAX_BYTES
    assert reader.read(bomb).parts[0].num_tokens == 16


@pytest.mark.parametrize(
    "save",
    [
        lambda image: saved(image, "PNG"),
        lambda image: saved(image, "BMP"),
        lambda image: saved(image, "WEBP", lossless=True),
        lambda image: saved(image.convert("RGBA"), "PNG"),
        lambda image: saved(image, "PNG", optimize=True),
    ],
    ids=["png", "bmp", "webp", "rgba", "optimised"],
)
def test_formats_without_loss_are_one_image(save: Callable[[Image.Image], bytes], reader: ImageReader) -> None:
    assert reader.read(save(PICTURE)) == reader.read(PNG)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "I;16", "CMYK"])
def test_modes_become_colours(mode: str, reader: ImageReader) -> None:
    if mode == "I;16":
        image = Image.new("I;16", (20, 20), 700)
    else:
        image = PICTURE.convert(mode)
    assert reader.read(saved(image, "JPEG" if mode == "CMYK" else "PNG")).parts[0].num_tokens == 16


def test_a_turned_photo_is_upright(reader: ImageReader) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned = saved(PICTURE.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert reader.read(turned) == reader.read(PNG)


def test_sources_of_a_program(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    for source in (PNG, path, str(path), f"file://{path}", url, PICTURE):
        assert Image.open(io.BytesIO(local_bytes(source))).tobytes() == PICTURE.tobytes()
    for bad in (tmp_path / "none.png", "https://example.com/a.png", 7, None, ["x"]):
        with pytest.raises(RequestError):
            local_bytes(bad)


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("data:image/png;base64,AAEC", b"\0\1\2"),
        ("data:;base64,AAEC", b"\0\1\2"),
        ("data:image/jpeg;name=a;base64,AAE=", b"\0\1"),
        ("data:image/png;base64,AA\nE", b"\0\1"),
        ("data:application/octet-stream;base64,_-8", b"\xff\xef"),
        ("data:image/png,%00a", b"\0a"),
        ("data:image/png;base64", None),
        ("data:image/png;base64,%%%", None),
        ("data:image/png;base64,A", None),
        ("data:text/html;base64,AAEC", None),
    ],
)
def test_data_urls(url: str, data: bytes | None) -> None:
    if data is None:
        with pytest.raises(RequestError):
            data_url_bytes(url)
    else:
        assert data_url_bytes(url) == data
    with pytest.raises(RequestError, match="base64"):
        base64_bytes("\udcff")


def test_images_are_taken_out_of_messages() -> None:
    parts = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "u1", "detail": "low"}},
        {"type": "image_url", "image_url": "u2"},
        {"type": "input_image", "image_url": "u3"},
        {"type": "image", "image": "u4"},
        {"type": "image_pil", "image_pil": PICTURE},
    ]
    messages, sources = take_images([{"role": "user", "content": parts}, {"role": "user", "content": "b"}], "<i>")
    assert sources == ["u1", "u2", "u3", "u4", PICTURE]
    assert messages[0]["content"] == [parts[0], *[{"type": "image", "marker": "<i>"}] * 5]
    for bad in ({"type": "image"}, {"type": "image_url"}, {"type": "image_url", "image_url": {"detail": "low"}}):
        with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\] is an image without"):
            take_images([{"role": "user", "content": [bad]}], "<i>")
