"""Routing: which replica gets which request. Pure, so the router and the cluster simulation decide alike."""
