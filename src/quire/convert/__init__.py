"""Converting a model once and for all: to packed weights, to floats, or to GGUF (`quire convert`).

`target` reads what is asked for, `output` makes sure that a result exists whole or not at all. `packed`, `floats` and
`gguf_model` write the three kinds of results; `companions` are the files beside the weights.
"""
