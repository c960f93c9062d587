"""The scripts main_*.py in an installed L2UL: the wheel has them in this package. In a clone they are at the top level.

`python -m l2ul NAME` starts main_NAME.py from either place.
"""
