"""The life of memories and questions over the worker pools.

`router` is the deployment that all clients ask, `pipeline` one question's way, `jobs` the making of versions.
"""
