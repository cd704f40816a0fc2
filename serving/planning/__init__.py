"""`memorag plan` and `memorag calibrate`: measured rates and shapes become a plan of a cluster.

`calibrate` measures, `shapes` reads config.json, `plan_curve` draws costs over load; the counting is in
`cluster.planning`.
"""
