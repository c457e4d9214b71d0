"""Ranks: several processes that hold one model together."""
