"""The methods, by name: the paper's, `distill`, and those of others. Importing this package registers all of them."""

from l2ul.methods import baselines, paper  # noqa: F401  # register themselves
