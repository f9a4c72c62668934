"""The Flamingo model in plain PyTorch: the definition that every exported graph and engine is compared with.

Importing this package does not import torch; `flamingo_reference.model` does.
"""
