"""Grammars over a model's tokens: which tokens a constraint allows next. llguidance compiles. No torch, no model."""
