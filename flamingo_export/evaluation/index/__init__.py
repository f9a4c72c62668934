"""An index of pictures for retrieval (RICES): features as plain files, exact search in blocks.

encoder       media -> vectors, by a bundle's vision encoder
store         the files: index.json, items.jsonl, features-NNNNN.safetensors; written in order, resumable
search        the nearest rows to queries, pairs of two indices that are too alike
similarity    examples by likeness, as evaluation asks for them
"""
