"""The solver: optimizers and schedules."""
