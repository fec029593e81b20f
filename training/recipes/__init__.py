"""Recipes that build a training set."""
