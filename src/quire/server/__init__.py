"""The HTTP server: the routes of OpenAI, Anthropic and Ollama in front of an engine. It knows nothing about tensors.

    app.py        the table of endpoints, the middleware that every request passes, 404 and 405
    endpoint.py   one HTTP request as a handler sees it: read, reply, stream, notice a client that leaves
    answers.py    one generation, whole or as events; chat.py and completions.py render it
    listen.py     the socket, signals and draining    logs.py   lines of text or JSON, the access log
    chat_turn.py  one turn of a conversation, for every endpoint that has conversations
    chat.py  completions.py  embeddings.py  infill.py  models.py  tokenize.py  health.py  metrics.py  kv.py  openapi.py
    responses/  anthropic/  ollama/  batches/    a file or a folder per group of endpoints
    decoding.py   from bytes to a body    protocol.py   OpenAI's bodies of requests    replies.py   and of replies

A new endpoint is one file with `ENDPOINTS` and one row in `app.py`. Nothing here imports torch, numpy or transformers.
"""
