"""ImageEncoding: decides which images a step encodes, and which embeddings the runner keeps.

The runner keeps embeddings by content hash, up to a number of tokens; the least recently used make room. A step encodes
images up to a budget of tokens, so that decoding sequences do not wait for many images at once. The first image of a
step may exceed the budget: every step that could compute a prompt computes some of it. A prompt whose next image does
not fit is computed up to it.
"""

from bisect import bisect_right
from collections import OrderedDict

from quire.image_input import ImagePixels, ImagePlan, PlacedRows
from quire.request import InputSpan, Request
from quire.scheduler.limits import SchedulerLimits
from quire.step import StepPlan


class ImageEncoding:
    """Owned by the scheduler."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._max_kept_tokens = limits.max_kept_image_tokens
        self._max_step_tokens = limits.max_step_image_tokens
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        """Hash → number of tokens, the least recently used first."""
        self._num_kept_tokens = 0
        self._forgotten: list[bytes] = []
        """Encoded by a step that was rolled back."""
        self.num_encoded = 0
        """Images encoded so far."""

    def reach(self, plan: StepPlan, request: Request, start: int, count: int) -> int:
        """How many of the `count` tokens from token `start` on can be computed in this step.

        Takes into the plan what they need of images: the caller computes exactly these tokens next.
        """
        if not request.pixels:
            return count
        inputs, first_token = request.inputs, len(plan.token_ids)
        for index in range(bisect_right(inputs, start, key=_end), len(inputs)):
            span = inputs[index]
            if span.offset >= start + count:
                break
            images = plan.images or ImagePlan([], [], [])
            if not self._hold(images, span, request.pixels[index]):
                return max(0, span.offset - start)
            plan.images = images
            begin, end = max(span.offset, start), min(_end(span), start + count)
            images.placed.append(
                PlacedRows(span.content_hash, begin - span.offset, first_token + begin - start, end - begin)
            )
        return count

    def finish(self, plan: StepPlan) -> None:
        """Pass on what a step that was rolled back has left in the runner."""
        if self._forgotten and plan.images is not None:
            plan.images.dropped[:0] = self._forgotten
            self._forgotten = []

    def roll_back(self, plan: StepPlan) -> None:
        """Whether the runner encoded the images of the plan is not known: count on none of them."""
        for content_hash, _ in plan.images.encoded if plan.images is not None else ():
            num_tokens = self._kept.pop(content_hash, 0)
            self._num_kept_tokens -= num_tokens
            self._forgotten.append(content_hash)

    def _hold(self, images: ImagePlan, span: InputSpan, pixels: ImagePixels) -> bool:
        """Whether the embeddings are kept, or can be computed in this step and kept."""
        content_hash, _, length = span
        if content_hash in self._kept:
            self._kept.move_to_end(content_hash)
            return True
        encoded = {encoded_hash for encoded_hash, _ in images.encoded}
        num_encoded = sum(self._kept[encoded_hash] for encoded_hash in encoded)
        if encoded and num_encoded + length > self._max_step_tokens:
            return False
        used = encoded.union(placed.content_hash for placed in images.placed)
        free = self._max_kept_tokens - sum(self._kept[used_hash] for used_hash in used)
        if length > free:
            return False
        while self._num_kept_tokens + length > self._max_kept_tokens:
            oldest = next(kept_hash for kept_hash in self._kept if kept_hash not in used)
            self._num_kept_tokens -= self._kept.pop(oldest)
            images.dropped.append(oldest)
        self._kept[content_hash] = length
        self._num_kept_tokens += length
        images.encoded.append((content_hash, pixels))
        self.num_encoded += 1
        return True


def _end(span: InputSpan) -> int:
    return span.offset + span.length
