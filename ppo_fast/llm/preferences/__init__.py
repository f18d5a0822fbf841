"""Preferences: pairs of answers, their labels, and reward models trained on them."""
