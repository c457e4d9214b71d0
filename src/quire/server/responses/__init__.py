"""OpenAI's Responses: requests and replies made of items, conversations that the server keeps, runs in the background.

protocol.py     bodies    items.py      from items to messages    renderer.py   from an Answer to items and events
store.py        kept responses (SQLite)    runs.py      responses in the background    endpoints.py    the routes
owners.py       servers that share a store
"""
