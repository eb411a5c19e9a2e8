"""Parallel context, parallel layers, pipeline schedules and the trainer."""
