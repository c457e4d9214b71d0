"""ImageEncoding: decides which images a step encodes, and which embeddings the runner keeps.

The runner keeps embeddings by content hash, up to a number of tokens; the least recently used make room. A step that
computes other tokens encodes images up to a budget (`encoding_budget`), so that other sequences wait little: an image
that exceeds what is left goes on in the next step. A step that would compute nothing else encodes a whole image. A
prompt is computed up to an image that is not encoded.
"""

from bisect import bisect_right
from collections import OrderedDict

from quire.image_input import EncodingOrder, ImagePixels, ImagePlan, PlacedRows
from quire.request import InputSpan, Request
from quire.scheduler.encoding_budget import EncodingBudget
from quire.scheduler.limits import SchedulerLimits
from quire.step import StepPlan


class ImageEncoding:
    """Owned by the scheduler."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.keeps_whole = limits.whole_images
        """The tokens of an image see each other, so they are computed in one step."""
        self._max_kept_tokens = limits.max_kept_image_tokens
        self._budget = EncodingBudget(limits)
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        """Hash → number of tokens, the least recently used first; images that are being encoded are among them."""
        self._begun: dict[bytes, float] = {}
        """Hash → how much of an image is encoded, in tokens, where it is not all."""
        self._num_kept_tokens = 0
        self._left = 0.0
        """Tokens' worth of encoding that the present step may still take."""
        self._forgotten: list[bytes] = []
        """Encoded by a step that was rolled back."""
        self.num_encoded = 0
        """Images encoded so far."""

    def whole(self, request: Request, start: int, count: int, most: int) -> int:
        """How many tokens from token `start` on to compute in place of `count`, so that they end inside no image: up to
        the end of the image that `count` tokens would cut, if that is at most `most` tokens; else up to its begin."""
        end = start + count
        for span in request.inputs if self.keeps_whole else ():
            if span.offset < end < _end(span):
                return _end(span) - start if _end(span) - start <= most else max(0, span.offset - start)
        return count

    def reach(self, plan: StepPlan, request: Request, start: int, count: int) -> int:
        """How many of the `count` tokens from token `start` on can be computed in this step.

        Takes into the plan what they need of images: the caller computes exactly these tokens next.
        """
        if not request.pixels:
            return count
        if plan.images is None:
            self._left = self._budget.of_step(len(plan.sample_rows))
        inputs, first_token = request.inputs, len(plan.token_ids)
        for index in range(bisect_right(inputs, start, key=_end), len(inputs)):
            span = inputs[index]
            if span.offset >= start + count:
                break
            images = plan.images or ImagePlan([], [], [])
            is_encoded = self._encode(images, span, request.pixels[index], alone=not plan.rows)
            if images.encoded or images.dropped or is_encoded:
                plan.images = images
            if not is_encoded:
                return max(0, span.offset - start)
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

    def measure(self, plan: StepPlan, seconds: float) -> None:
        """Record how long a step took."""
        if self._max_kept_tokens and plan.rows:
            only_decodes = len(plan.token_ids) == len(plan.sample_rows)
            num_encoded = 0.0 if plan.images is None else plan.images.num_encoded
            self._budget.measure(num_encoded, seconds, only_decodes=only_decodes)

    def roll_back(self, plan: StepPlan) -> None:
        """How far the runner came with the images of the plan is not known: count on none of them."""
        for order in plan.images.encoded if plan.images is not None else ():
            self._num_kept_tokens -= self._kept.pop(order.content_hash, 0)
            self._begun.pop(order.content_hash, None)
            self._forgotten.append(order.content_hash)

    def _encode(self, images: ImagePlan, span: InputSpan, pixels: ImagePixels, *, alone: bool) -> bool:
        """Whether the embeddings are kept, or will be with what the step encodes. `alone`: it computes nothing else."""
        content_hash, _, length = span
        if content_hash in self._kept:
            self._kept.move_to_end(content_hash)
            if content_hash not in self._begun:
                return True
        done = self._begun.get(content_hash, 0.0)
        share = length - done
        if not alone or images.encoded:
            share = min(share, self._left)
        if share <= 0:
            return False
        if content_hash not in self._kept:
            if not self._make_room(images, length):
                return False
            self._kept[content_hash] = length
            self._num_kept_tokens += length
        self._left -= share
        images.num_encoded += share
        if done + share < length:
            images.encoded.append(EncodingOrder(content_hash, pixels, done + share, length))
            self._begun[content_hash] = done + share
            return False
        images.encoded.append(EncodingOrder(content_hash, pixels, length, length))
        self._begun.pop(content_hash, None)
        self.num_encoded += 1
        return True

    def _make_room(self, images: ImagePlan, length: int) -> bool:
        """Drop embeddings until so many tokens more can be kept; those that the step uses stay."""
        used = {order.content_hash for order in images.encoded}
        used |= {placed.content_hash for placed in images.placed}
        if length > self._max_kept_tokens - sum(self._kept[used_hash] for used_hash in used):
            return False
        while self._num_kept_tokens + length > self._max_kept_tokens:
            oldest = next(kept_hash for kept_hash in self._kept if kept_hash not in used)
            self._num_kept_tokens -= self._kept.pop(oldest)
            self._begun.pop(oldest, None)
            images.dropped.append(oldest)
        return True


def _end(span: InputSpan) -> int:
    return span.offset + span.length
