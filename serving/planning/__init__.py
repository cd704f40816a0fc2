"""`memorag plan` and `memorag calibrate`: rates and shapes become a plan of a cluster.

`calibrate` measures rates, `sizes` turns a profile into numbers, and data sheets into rates; the counting is in
`cluster.planning`.
"""
