"""decode: the picture in the bytes of a file. Runs in a process that may be killed (`quire.engine.image_process`)."""

import io

import numpy as np

from quire.errors import RequestError
from quire.images.picture import Picture

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Pillow's names of the formats that are read; its other readers are never loaded."""
SUPPORTED = "JPEG, PNG, WebP, GIF and BMP"
_ANIMATED = ("GIF", "PNG", "WEBP")


def load_readers() -> None:
    """Import Pillow and its readers of these formats. Raises `ImportError` if it is not installed."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401


def decode(data: bytes, max_pixels: int) -> Picture:
    """The picture, turned upright as its EXIF says. Raises `RequestError` for what is no image of one frame, is broken,
    or has more than `max_pixels`, which is seen before pixels are read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # the limit below comes first and is an error, not a warning
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _refusal(
                    f"the image has {width} × {height} pixels, more than the limit of {max_pixels:,} "
                    "(max_image_pixels); send a smaller one",
                    "image_too_large",
                )
            if image.format in _ANIMATED and getattr(image, "is_animated", False):
                raise _refusal("the image is an animation; send one frame of it")
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise _refusal(f"the data is no image that can be read; supported are {SUPPORTED}") from None
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise _refusal(f"the image is broken or cut off: {error}") from None
    except Image.DecompressionBombError as error:
        raise _refusal(f"the image is too large: {error}", "image_too_large") from None


def _refusal(message: str, code: str = "invalid_image") -> RequestError:
    return RequestError(message, param="messages", code=code)
