"""Gradient-boosted trees by XGBoost, data-parallel over a run's workers."""
