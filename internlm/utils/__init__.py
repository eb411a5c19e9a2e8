"""Ground layer: helpers that know nothing of the framework above them."""
