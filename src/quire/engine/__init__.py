"""One request's life: tokens in, steps, text out; and the processes in which that happens."""
