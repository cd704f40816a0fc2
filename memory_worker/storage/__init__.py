"""Memories as files: the record from which all else can be made again (DESIGN §5, tier 2).

`manifest` says what a version holds, `segments` is the format of its tensors, `store` writes, publishes and reads.
"""
