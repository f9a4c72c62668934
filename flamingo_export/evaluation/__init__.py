"""Few-shot evaluation as the paper does it, of bundles, servers and any other model that follows `protocol.EvaluatedModel`.

task, tasks/      what a benchmark is; one small file each
reading           published files, faults named by file and line
metrics/          from libraries or checked against the official code
selection         which examples come before a query; index/ finds similar ones
prompts, asking   requests made and put to a model
predictions       what it said, on the disk, resumable
statistics        intervals, pairs
results, page     tables and the page
run               evaluate(): all of it in order
"""
