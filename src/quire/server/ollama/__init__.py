"""Ollama's API: /api/chat, generate, embed, tags, show, ps and version.

protocol.py  bodies    conversion.py  from bodies to a chat or a completion    renderer.py  from an Answer to lines
endpoints.py  chat, generate, embed    models.py  what Ollama's clients ask about models
"""
