"""Web pages of ours: one base and one style for the reports and the server's page, and plots that reflow.

A page is one file: styles, plots and pictures are inside, nothing is fetched.
"""
