"""Running a bundle somewhere else: folders for containers, Kubernetes and other hosts, and how many of them a load needs.

A generated folder holds no bundle; `OUT/run BUNDLE` takes one.
"""
