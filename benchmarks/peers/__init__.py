"""Quire and other engines on the same weights, the same requests and the same machine, in one run."""
