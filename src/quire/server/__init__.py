"""The HTTP server: OpenAI's routes in front of an engine. It knows OpenAI's words and nothing about tensors.

    app.py        the table of endpoints, the door every request passes, 404 and 405
    exchange.py   one HTTP exchange as an endpoint sees it: read, reply, stream, watch for the client leaving
    listen.py     the socket, signals and draining
    chat.py  completions.py  models.py  tokenize.py  health.py  metrics.py  openapi.py    one file per group of routes

A new endpoint is one file with `ENDPOINTS` and one row in `app.py`. Nothing here imports torch, numpy or transformers.
"""
