"""Memory models: what reads tokens and gives keys and values, and how it is asked.

`beacon` computes beacon memories, `stock` lets transformers read what that does not,
`prompts` is all that they are told.
"""
