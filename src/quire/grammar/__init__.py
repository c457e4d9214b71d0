"""What a form of text allows next: grammars over a model's tokens, compiled by llguidance. No torch, no model."""
