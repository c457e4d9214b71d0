"""The engine at the scale of a data centre: the same scheduler and pool against a modelled executor. No torch."""
