"""Four samples of one prompt: its KV is computed and stored once, and the samples share it."""

from quire import LLM, SamplingParams

llm = LLM(max_num_seqs=16, kv_cache_memory="64MiB")
prompt = "KING RICHARD III:\nNow is the winter of our discontent\nMade glorious summer by"
(output,) = llm.generate(prompt, SamplingParams(n=4, temperature=0.9, seed=7, max_tokens=24))
for sample in output.outputs:
    print(f"{sample.index}: {sample.text!r}")
stats = llm.stats()
print(f"{stats.total_prompt_tokens} prompt tokens computed, {stats.total_block_copies} blocks copied on write")
