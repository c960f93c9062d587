"""The methods by name: the paper's, `distill` and baselines. Importing this package registers all of them."""

from l2ul.methods import paper, distill, baselines  # noqa: F401  # isort: skip  # registered in this order
