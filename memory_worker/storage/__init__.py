"""Memories as files: the record from which all else can be made again (DESIGN §5, tier 2).

`segments` is the format of their tensors; `store` writes, publishes and reads them, and their manifests.
"""
