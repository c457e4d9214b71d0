"""RequestCheck: refuses requests that could never run, with the numbers that say why."""

from quire.errors import RequestError
from quire.kv_cache.block_pool import BlockPool
from quire.request import Request
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.registered_prefixes import RegisteredPrefixes
from quire.scheduler.sequence import SequenceGroup


class RequestCheck:
    """Owned by the scheduler."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, prefixes: RegisteredPrefixes) -> None:
        self._limits = limits
        self._pool = pool
        self._prefixes = prefixes

    def check_lengths(self, request: Request) -> None:
        """As the function of that name."""
        check_lengths(request, max_model_len=self._limits.max_model_len, max_num_seqs=self._limits.max_num_seqs)
        self._check_images(request)

    def _check_images(self, request: Request) -> None:
        """Raise `RequestError` for an image that the model cannot read, or whose embeddings could never be kept."""
        most = self._limits.max_kept_image_tokens
        if not request.pixels or not request.inputs:
            return
        if not most:
            raise RequestError("the model reads no images; send text only", param="messages", code="no_images")
        longest = max(span.length for span in request.inputs)
        if longest > most:
            raise RequestError(
                f"an image has {longest} tokens, but the embeddings of at most {most} are kept "
                "(image_cache_tokens); send a smaller image",
                param="messages",
            )

    def check_memory(self, group: SequenceGroup) -> None:
        """Raise `RequestError` for a group that may need more blocks than registered prefixes leave."""
        pool, request = self._pool, group.request
        needed, pinned = group.max_blocks(pool), self._prefixes.num_blocks
        if pinned and needed > pool.num_blocks - pinned and not group.lacks_prompt_logprobs:
            needed -= self._prefixes.num_found(group.leader.table, request.prompt_token_ids)
        if needed > pool.num_blocks - pinned:
            held = f", of which {pinned} are registered prefixes'" if pinned else ""
            raise RequestError(
                f"{_num_sequences(request)[1]} sequences of {group.num_prompt_tokens} prompt + {request.max_tokens} "
                f"output tokens can need {needed} KV blocks of {pool.block_size} tokens, but the pool has "
                f"{pool.num_blocks}{held}; ask for less or raise kv_cache_memory",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def check_room_beside(self, groups: list[SequenceGroup], num_new_blocks: int) -> None:
        """Raise `RequestError` if one of the groups might not fit beside a prefix that takes so many more blocks."""
        left = self._pool.num_blocks - self._prefixes.num_blocks - num_new_blocks
        most = max((group.max_blocks(self._pool) for group in groups), default=0)
        if most > left:
            raise RequestError(
                f"a request in flight can need {most} KV blocks, and the prefix would leave {left}; register it later",
                param="prefix",
            )


def check_lengths(request: Request, *, max_model_len: int, max_num_seqs: int) -> None:
    """Raise `RequestError` for a request of more tokens or sequences than may run."""
    num_prompt = len(request.prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("the prompt is empty: it must hold at least one token", param="prompt")
    if num_prompt + request.max_tokens > max_model_len:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}; together they exceed "
            f"this model's context: its maximum context length is {max_model_len} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    name, num_sequences = _num_sequences(request)
    if num_sequences > max_num_seqs:
        raise RequestError(
            f"{name} is {num_sequences}, but at most {max_num_seqs} sequences run at once (max_num_seqs)",
            param=name,
        )


def _num_sequences(request: Request) -> tuple[str, int]:
    """How many sequences a request runs at once, and the parameter that says so."""
    params = request.params
    return ("n", params.n) if params.beam_width is None else ("beam_width", params.beam_width)
