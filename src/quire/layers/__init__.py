"""The parts models are made of; each holds its weights and is called with tensors."""
