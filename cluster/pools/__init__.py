"""Pools of GPUs: how many replicas of what size, on which nodes, and when there are more or fewer.

`pools` holds the settings, `placement` says whether nodes have the room, `autoscaling` is the policy Serve asks.
"""
