"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 with one KV head for all queries, or with one for each."""

from quire.models.gpt2 import GPT2


class GPTBigCode(GPT2):
    """GPT-2's names."""

    stores_transposed = False
    rows_by_kv_head = True
