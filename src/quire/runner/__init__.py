"""Executing: the only room where a plan meets tensors."""
