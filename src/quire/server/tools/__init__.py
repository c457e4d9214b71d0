"""Tool calls and reasoning: how each model family writes them, one parser that reads them, grammars that force them.

`formats` is the table, `reader` and `calls` read a reply, `grammar` writes the grammar of a forced call, `request`
reads a client's tools, `events` is what a reply consists of. No HTTP here.
"""
