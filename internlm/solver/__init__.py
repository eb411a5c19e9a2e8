"""Optimizers, and schedules of their hyperparameters."""
