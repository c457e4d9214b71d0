"""KV events: what an engine's KV cache holds, published in vLLM's format, and read from any engine that writes it."""
