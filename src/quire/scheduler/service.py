"""Service: what computing tokens is worth, in one unit, for policies that order requests or share among tenants by it.

The weights are those of VTC (Sheng et al., OSDI 2024): a token of output is worth two of the prompt.
"""

PROMPT_TOKEN = 1.0
OUTPUT_TOKEN = 2.0
