"""Continue a few prompts with the bundled model, in one batch and in this process."""

from quire import LLM, SamplingParams

llm = LLM(max_num_seqs=16, kv_cache_memory="64MiB")
prompts = ["ROMEO:\n", "First Citizen:\nBefore we proceed any further, ", "O, "]
for output in llm.generate(prompts, SamplingParams(temperature=0.8, seed=1, max_tokens=40)):
    print(f"{output.prompt}\033[1m{output.outputs[0].text}\033[0m\n")
