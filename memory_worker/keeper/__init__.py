"""Memories near the engines: one actor a node keeps segments in the object store (DESIGN §5, tier 1).

`keeper` is that actor, `peers` fetches what another node has already read, `tier_metrics` says how often.
"""
