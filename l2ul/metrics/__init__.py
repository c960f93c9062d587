"""Metrics of an unlearned model.

`registry` lists them, `groups` computes the groups of `--evaluate`, and `columns` describes their table columns. Each
other module is one family of metrics on models and tensors. Nothing here knows about runs, records or command lines.
"""
