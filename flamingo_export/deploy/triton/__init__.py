"""A bundle behind Triton Inference Server: its Python backend hands requests to the engine, where they share steps.

    client -> Triton (HTTP, gRPC, queue, metrics) -> `model.py` -> `backend.Requests` -> the engine

`backend` runs within Triton's process for Python models, where Triton's own module exists; `requests` does not know Triton.
"""
