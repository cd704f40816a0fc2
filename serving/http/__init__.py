"""The way in: FastAPI over the Router, what it lets pass, and what it says when it does not.

`ingress` has the routes, `gate` says who asks, `admission` how much, `problems` turns failures into RFC 9457.
"""
