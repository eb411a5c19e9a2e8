"""Ground layer: helpers that import nothing of the framework above them."""
