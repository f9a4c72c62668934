"""Few-shot evaluation as the paper does it, of bundles, servers and any other model that follows `protocol.EvaluatedModel`.

task, tasks/      what a benchmark is; one small file each
reading           published files, faults named by file and line
metrics/          from libraries or checked against the official code
"""
