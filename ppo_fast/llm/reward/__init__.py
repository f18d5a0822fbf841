"""Reward functions: how they are loaded, called, checked and weighted."""
