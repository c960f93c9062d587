"""Experiments: what a run is, how it is carried out and evaluated, and its record.

`runs` plans runs, `execution` carries them out, `adversarial_sets` and `measurement` attack and evaluate for it, and
`records` is the schema of what is written. Nothing here knows about command lines, tables or sweeps.
"""
