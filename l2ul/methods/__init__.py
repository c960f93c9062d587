"""Unlearning methods: the registry and its settings, the paper's methods, `distill`, and methods of others."""
