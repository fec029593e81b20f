"""Recipes that build training sets."""
