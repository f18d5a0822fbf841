"""Rollouts as packed rows, and attention over them."""
