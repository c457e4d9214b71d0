"""Deciding: which sequences get how many tokens in the next step, and who yields when memory runs short. No torch."""
