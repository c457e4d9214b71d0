"""LLM, the offline interface, on the bundled model."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, ConfigError, EngineConfig, RequestError, SamplingParams
from quire.outputs import RequestOutput
from quire.sampling.logits_processors import RowView

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_blocks=500, max_num_seqs=32, threads=1, dtype="float32")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_one_prompt_or_many_as_text_or_ids(llm: LLM) -> None:
    prompts = ["ROMEO:", "JULIET:"]
    expected = texts(llm.generate(prompts, GREEDY))
    ids = [llm.get_tokenizer().encode(prompt) for prompt in prompts]
    assert texts(llm.generate(ids, GREEDY)) == expected
    assert texts(llm.generate([{"prompt": prompts[0]}, {"prompt_token_ids": ids[1]}], GREEDY)) == expected
    assert texts(llm.generate(prompts[0], GREEDY)) == expected[:1]
    assert texts(llm.generate(ids[1], GREEDY)) == expected[1:]
    assert llm.generate([], GREEDY) == []


def test_parameters_per_prompt_in_one_batch(llm: LLM) -> None:
    params = [
        GREEDY,
        SamplingParams(temperature=0.9, seed=3, max_tokens=10, ignore_eos=True),
        SamplingParams(n=3, seed=4, max_tokens=5, logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=30, stop=["\n"]),
        SamplingParams(seed=6, max_tokens=4, prompt_logprobs=1, allowed_token_ids=[70, 71], ignore_eos=True),
    ]
    together = llm.generate(["ROMEO:"] * 5, params)
    for params_of_one, output in zip(params, together, strict=True):
        (alone,) = llm.generate(["ROMEO:"], params_of_one)
        assert [sample.token_ids for sample in alone.outputs] == [sample.token_ids for sample in output.outputs]
    assert [sample.index for sample in together[2].outputs] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in together[2].outputs}) > 1
    assert all(len(sample.logprobs or []) == 5 for sample in together[2].outputs)
    assert set(together[4].outputs[0].token_ids) <= {70, 71}
    assert together[4].prompt_logprobs is not None
    assert len(together[4].prompt_logprobs) == len(together[4].prompt_token_ids)


def test_samples_of_a_prompt_share_its_blocks(llm: LLM) -> None:
    before = llm.stats().total_prompt_tokens
    llm.reset_prefix_cache()
    prompt = list(range(5, 105))  # six full blocks and a partly filled one
    copies = llm.stats().total_block_copies
    llm.generate([prompt], SamplingParams(n=4, max_tokens=3, seed=1, ignore_eos=True))
    stats = llm.stats()
    assert stats.total_prompt_tokens - before == 100
    assert stats.total_block_copies - copies == 3


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_best_of_returns_the_most_likely_of_its_samples(llm: LLM, mode: str) -> None:
    all_six = SamplingParams(n=6, seed=5, temperature=1.3, top_k=50, max_tokens=9, logprobs=2, logprobs_mode=mode)
    (whole,) = llm.generate(["ROMEO:"], all_six)
    best_first = sorted(
        whole.outputs,
        key=lambda sample: -sum(p[t].logprob for p, t in zip(sample.logprobs or [], sample.token_ids, strict=True)),
    )
    assert len({tuple(sample.token_ids) for sample in whole.outputs}) > 3
    for asked, shown in ((2, 9), (None, 0)):
        (best,) = llm.generate(["ROMEO:"], all_six.with_changes(n=2, best_of=6, logprobs=asked))
        assert [sample.token_ids for sample in best.outputs] == [sample.token_ids for sample in best_first[:2]]
        assert [sample.text for sample in best.outputs] == [sample.text for sample in best_first[:2]]
        assert [sample.index for sample in best.outputs] == [0, 1]
        assert [len(sample.logprobs or []) for sample in best.outputs] == [
            min(shown, len(s.token_ids)) for s in best.outputs
        ]
        assert best.finished
    (plain,) = llm.generate(["ROMEO:"], all_six.with_changes(best_of=6))
    assert [sample.token_ids for sample in plain.outputs] == [sample.token_ids for sample in whole.outputs]


def test_same_seed_same_tokens_and_defaults_of_the_model(llm: LLM) -> None:
    sampled = SamplingParams(temperature=1.0, seed=11, max_tokens=20)
    assert texts(llm.generate("O", sampled)) == texts(llm.generate("O", sampled))
    assert llm.get_default_sampling_params().temperature != 0.0
    assert texts(llm.generate("O"))  # None takes them


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Speak, my lord."}]
    (one,) = llm.chat(messages, GREEDY)
    assert one.outputs[0].text
    two = llm.chat([messages, messages], GREEDY)
    assert texts(two) == [one.outputs[0].text] * 2
    assert texts(llm.chat("Speak, my lord.", GREEDY)) == [one.outputs[0].text]
    assert texts(llm.chat(messages[0], GREEDY)) == [one.outputs[0].text]
    assert llm.chat([], GREEDY) == []
    template = "{% for message in messages %}{{ message.content }}{% endfor %}{{ tools | length }}"
    (other,) = llm.chat(messages, GREEDY, chat_template=template, tools=[{"type": "function"}, {"type": "function"}])
    assert other.prompt == "Speak, my lord.2"
    with pytest.raises(RequestError, match="chat_template, line 1"):
        llm.chat(messages, GREEDY, chat_template="{% for")
    for wrong in (["Speak, my lord."], [[messages[0], "and"]], [messages, "and"]):
        with pytest.raises(
            RequestError, match=r"messages holds .*; a conversation is a list of messages such as"
        ) as error:
            llm.chat(wrong, GREEDY)  # type: ignore[arg-type]  # what a user may try
        assert error.value.param == "messages"


def test_what_a_notebook_shows(llm: LLM) -> None:
    pool = 500 * llm.memory_plan.kv_bytes_per_token * 16 / 2**20
    assert repr(llm) == f"LLM(quire-bundled, float32, KV pool of 500 blocks × 16 tokens ({pool:.0f} MiB, float32), cpu)"
    llm._engine.add_request("first", "ROMEO:", GREEDY)
    llm._engine.add_request("<b>", "JULIET:", GREEDY.with_changes(n=3))
    for _ in range(3):
        llm._engine.step()
    report = llm.memory_report()
    pool_line, slots_line, requests_line, head, *rows = str(report).splitlines()
    assert "of 500 blocks of 16 tokens used" in pool_line
    assert "wasted" in slots_line
    assert requests_line == "requests: 2 running, 0 waiting"
    assert head.split()[:5] == ["request", "state", "sequences", "tokens", "blocks"]
    assert [row.split()[:3] for row in rows] == [["first", "running", "1"], ["<b>", "running", "3"]]
    assert all(row[head.index("state") :].startswith("running") for row in rows)
    html = report._repr_html_()
    assert html.count("<tr>") == 3
    assert "<td>&lt;b&gt;</td>" in html
    assert "<b>" not in html
    for request_id in ("first", "<b>"):
        llm._engine.abort(request_id)
    assert len(str(llm.memory_report()).splitlines()) == 3
    assert "<tr>" not in llm.memory_report()._repr_html_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 4}, "unknown option max_num_seq; did you mean max_num_seqs?"),
        ({"dtype": "int3"}, "dtype is 'int3'; it must be one of auto, float32, float16, bfloat16"),
        ({"block_size": 0}, "block_size is 0; it must be an integer from 1 to 1024"),
        ({"max_num_seqs": 300, "max_num_batched_tokens": 200}, "less than max_num_seqs 300"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory is 'lots'; give a positive number of bytes"),
        ({"speculative_config": "ngram"}, "speculative_config is 'ngram', which is not JSON"),
        ({"speculative_config": [1]}, "speculative_config is [1]; it must be an object"),
        ({"speculative_config": {"method": "eagle"}}, "asks for 'eagle'; Quire drafts without a second model"),
        ({"speculative_config": {"tokens": 5}}, "unknown ['tokens']; it may have method, num_speculative_tokens"),
        ({"speculative_config": {"num_speculative_tokens": 0}}, "is 0; it must be an integer from 1 to 64"),
        ({"speculative_config": {"prompt_lookup_min": 9}}, "prompt_lookup_min is 9, more than prompt_lookup_max 8"),
        ({"scheduling_policy": "sjf"}, "scheduling_policy is 'sjf'; it must be one of fcfs, shortest, fair"),
        ({"admission": "all"}, "admission is 'all'; it must be one of current, predicted"),
        ({"decode_context_parallel_size": 2}, "is 2; it must be 1: Quire divides every layer; see tensor_parallel"),
        ({"trust_remote_code": True}, "is True; it must be False: Quire never runs code from a checkpoint"),
        ({"quantization": "int3"}, "quantization is 'int3'; it must be one of int8, int4, int4-fast, or left out"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(**options)
    assert message in str(caught.value)


def test_options_of_vllm_that_ask_for_nothing_are_accepted() -> None:
    given = {"tensor_parallel_size": 1, "trust_remote_code": False, "enable_chunked_prefill": True, "enable_lora": None}
    assert EngineConfig.from_options({"seed": 3, **given}) == EngineConfig(seed=3)


@pytest.mark.parametrize("option", ["disk_cache", "weights_cache"])
@pytest.mark.parametrize("place", ["/proc/quire", "file/folder", "file"])
def test_a_folder_that_cannot_be_used_is_refused_before_anything_loads(option: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = str(tmp_path / place)  # an absolute place stays
    with pytest.raises(ConfigError, match=f"{option} is '{folder}', which cannot be used: .*; give a folder"):
        LLM(model="/no/such/model", **{option: folder})


def test_a_bad_request_leaves_an_empty_engine(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the model's vocabulary ends"):
        llm.generate(["ROMEO:", [10**7]], GREEDY)
    with pytest.raises(RequestError, match="2 prompts came with 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match="it must hold at least one token"):
        llm.generate([[]], GREEDY)


def test_a_registered_prefix_outlives_everything_that_would_evict_it() -> None:
    llm = LLM(num_blocks=40, max_num_seqs=8, threads=1, dtype="float32")
    prefix = list(range(5, 75))  # four full blocks and six tokens
    handle = llm.register_prefix(prefix)
    assert (handle.num_tokens, handle.num_kept_tokens) == (70, 64)
    assert (llm.stats().num_pinned_blocks, llm.stats().num_used_blocks) == (4, 4)
    llm.generate([[100 + i] * 90 for i in range(20)], GREEDY)
    llm.reset_prefix_cache()
    (output,) = llm.generate([[*prefix, 9, 9]], GREEDY)
    assert output.num_cached_tokens >= 64
    (salted,) = llm.generate([[*prefix, 9, 9]], GREEDY, cache_salt="other")
    assert salted.num_cached_tokens == 0
    assert salted.outputs[0].token_ids == output.outputs[0].token_ids
    llm.unregister_prefix(handle)
    llm.unregister_prefix(handle)
    assert (llm.stats().num_pinned_blocks, llm.stats().num_used_blocks) == (0, 0)
    llm.generate([[100 + i] * 90 for i in range(20)], GREEDY)
    assert llm.generate([[*prefix, 9, 9]], GREEDY)[0].num_cached_tokens == 0


def test_prefixes_that_cannot_be_kept_are_refused_with_the_numbers() -> None:
    llm = LLM(num_blocks=10, max_num_seqs=2, threads=1, dtype="float32")
    llm.register_prefix([7] * 48)
    with pytest.raises(
        RequestError, match=r"takes 3 more KV blocks of 16 tokens; registered prefixes hold 3 and may hold 5 of .* 10"
    ):
        llm.register_prefix([8] * 48)
    with pytest.raises(RequestError, match="the prefix has 15 tokens; only full blocks are kept, of 16 tokens"):
        llm.register_prefix([8] * 15)
    with pytest.raises(RequestError, match=r"can need 8 KV blocks .* the pool has 10, of which 3 are registered"):
        llm.generate([[9] * 100], GREEDY.with_changes(max_tokens=20))
    # The same length fits if it begins with a registered prefix.
    assert len(llm.generate([[7] * 100], GREEDY.with_changes(max_tokens=20))[0].outputs[0].token_ids) == 20
    with pytest.raises(RequestError, match="prefixes need the prefix cache"):
        LLM(num_blocks=10, max_num_seqs=2, threads=1, enable_prefix_caching=False).register_prefix([7] * 48)


def test_a_raising_logits_processor_ends_its_own_request(llm: LLM) -> None:
    def late(output_token_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output_token_ids) == 3:
            raise ValueError("three is enough")
        return logits

    alone = llm.generate(["ROMEO:", "JULIET:"], GREEDY)
    params = [GREEDY, GREEDY.with_changes(logits_processors=[late]), GREEDY]
    together = llm.generate(["ROMEO:", "ROMEO:", "JULIET:"], params)
    assert texts([together[0], together[2]]) == texts(alone)
    failed = together[1].outputs[0]
    assert failed.token_ids == alone[0].outputs[0].token_ids[:3]
    assert failed.finish_reason == "error"
    assert failed.error == "the logits processor late failed: ValueError: three is enough"


class OneLetter:
    """Restricts labelled requests to the token of their label."""

    def wants(self, params: SamplingParams) -> bool:
        return "only" in params.extra

    def apply(self, logits: torch.Tensor, rows: Sequence[RowView]) -> torch.Tensor:
        kept = torch.full_like(logits, -torch.inf)
        kept[range(len(rows)), [int(row.params.extra["only"]) for row in rows]] = 0.0
        return kept


@pytest.mark.parametrize("registered", [OneLetter(), f"{__name__}:OneLetter"], ids=["object", "name"])
def test_a_registered_batch_processor(llm: LLM, registered: Any) -> None:
    other = LLM(num_blocks=100, max_num_seqs=8, threads=1, dtype="float32", logits_processors=[registered])
    labelled = GREEDY.with_changes(extra={"only": "77"})
    plain, only = other.generate(["ROMEO:", "ROMEO:"], [GREEDY, labelled])
    assert plain.outputs[0].token_ids == llm.generate("ROMEO:", GREEDY)[0].outputs[0].token_ids
    assert only.outputs[0].token_ids == [77] * 12


def test_ctrl_c_leaves_an_empty_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = llm._engine.step
    steps = 0

    def interrupted() -> list[RequestOutput]:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["ROMEO:", "JULIET:"], SamplingParams(n=2, max_tokens=50))


def test_whichever_thread_asks_as_many_compute() -> None:
    """OpenMP's number of threads belongs to the calling thread; a new thread would use all cores. Kernels' threads stay
    when a loop ends, and those of earlier engines are used again."""
    llm = LLM(num_blocks=16, max_num_seqs=1, max_model_len=64, threads=3, dtype="float32")

    def num_started() -> int:
        before = len(os.listdir("/proc/self/task"))
        llm.generate("ROMEO:", GREEDY)
        return len(os.listdir("/proc/self/task")) - before

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(num_started).result() <= 2
