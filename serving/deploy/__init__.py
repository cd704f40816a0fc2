"""The application graph, and servers of it: on this machine, or on a cluster that somebody else runs.

`app` builds it, `daemon` starts and ends it here, `application` is what a Serve config file imports.
"""
