"""Memory: a pool of fixed-size KV blocks, the block tables that hold them, their names, and the tensors behind them."""
