"""Anthropic's Messages: /v1/messages and /v1/messages/count_tokens.

protocol.py  bodies    blocks.py  from content blocks to messages    renderer.py  from an Answer to blocks and events
"""
