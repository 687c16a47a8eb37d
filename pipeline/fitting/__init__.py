"""Fitting Gaussians to images; fit.py first."""
