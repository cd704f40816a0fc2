"""How large a cluster must be: counted from shapes of models, measured rates and what is asked of it.

`costs` has bytes and operations of memories, `plan` the replicas and nodes that follow.
"""
