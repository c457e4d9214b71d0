"""Model families, and the reading of their checkpoints."""
