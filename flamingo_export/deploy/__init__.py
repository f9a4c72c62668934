"""Folders that run a bundle somewhere else: containers, Kubernetes. A generated folder holds no bundle; `OUT/run BUNDLE` takes one."""
