"""The images of a chat: taken out of its messages, fetched if they are URLs, read, and put into its prompt."""

from msgspec import structs

from quire.engine.image_prompt import ImageSupport, check_count, no_images
from quire.engine.message_images import data_url_bytes, is_image, take_images
from quire.errors import RequestError
from quire.image_input import ReadImage
from quire.server.endpoint import RequestContext
from quire.server.protocol import ChatCompletionRequest, TokenizeRequest


async def without_images(
    context: RequestContext, request: ChatCompletionRequest | TokenizeRequest
) -> tuple[ChatCompletionRequest | TokenizeRequest, list[ReadImage]]:
    """The request with a plain part in the place of each image, and the images. Raises `RequestError` for an image that
    cannot be read, and for any that comes to a model which reads text only."""
    messages = request.messages or []
    if not any(isinstance(message.content, list) and any(map(is_image, message.content)) for message in messages):
        return request, []
    support = image_support(context)
    plain, sources = take_images([{"content": message.content} for message in messages], support.expander.marker)
    check_count(len(sources), support.max_images)
    images = [await support.reader.read(await _bytes_of(context, source)) for source in sources]
    kept = [structs.replace(message, content=found["content"]) for message, found in zip(messages, plain, strict=True)]
    return structs.replace(request, messages=kept), images


def image_support(context: RequestContext) -> ImageSupport:
    """What reads the images. Raises `RequestError` if the model reads text only."""
    support = context.engine.images
    if support is None:
        raise no_images()
    return support


async def _bytes_of(context: RequestContext, source: object) -> bytes:
    if not isinstance(source, str):
        raise RequestError("an image is no text; give a data URL such as data:image/png;base64,…", param="messages")
    if source[:5].lower() == "data:":
        return data_url_bytes(source)
    return await context.services.media.fetch(source)
