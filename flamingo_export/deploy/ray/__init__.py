"""Replicas of the server on Ray Serve, behind an ingress of ours, and offline work on Ray Data.

    client -> Ray's HTTP proxy -> Ingress (keys, limits, seeds, retries) -> Replica (the server's ASGI application and its engine)

`start` deploys; `replay` and `requests` know nothing of Ray. Ray itself is imported where it is used: it is an extra.
"""
