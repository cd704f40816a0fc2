"""Texts become segments: read once, in windows, and written as they are made.

`memorizer` is the deployment, `checkpoint` lets a killed job go on, `ranks` spreads windows over processes, `kinds` are
the ways to make slots.
"""
