"""Preferences: pairs of completions, their labels, and reward models that are trained on them."""
