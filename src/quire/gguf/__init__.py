"""GGUF, llama.cpp's file of a model: reads it as plain values, without torch.

`header` parses and checks the bytes, `file` joins the parts of a split model, `block_types` lists how numbers are
stored, and `names` gives each tensor the name that Hugging Face's checkpoints have for it.
"""
