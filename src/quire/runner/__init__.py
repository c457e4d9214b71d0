"""Executes step plans: the only room where a plan meets tensors."""
