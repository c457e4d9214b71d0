"""The HTTP server: OpenAI's routes in front of an engine. It knows OpenAI's words and nothing about tensors.

    app.py        the table of endpoints, the middleware that every request passes, 404 and 405
    endpoint.py   one HTTP request as a handler sees it: read, reply, stream, notice a client that leaves
    answers.py    one generation, whole or as events; chat.py and completions.py render it
    listen.py     the socket, signals and draining
    chat.py  completions.py  models.py  tokenize.py  health.py  metrics.py  kv.py  openapi.py    a file per group
    protocol.py   bodies of requests    replies.py   bodies of replies

A new endpoint is one file with `ENDPOINTS` and one row in `app.py`. Nothing here imports torch, numpy or transformers.
"""
