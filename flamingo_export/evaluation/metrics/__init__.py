"""Metrics, each from a library or checked against the official code.

base          what a metric takes and gives
text          equal texts: exact, top1, iVQA's accuracy
vqa           VQA accuracy, the official rule
caption       CIDEr (pycocoevalcap, Java)
wups          WUPS (nltk, WordNet)
ranking       closed tasks: choice, NDCG, ROC AUC, mWAP, R@k
registry      by name
"""
