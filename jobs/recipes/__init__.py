"""Recipes for `splatshard train`: each file's docstring has its command and what comes out."""
