"""Dry run: the training path of one rank of any world, without devices, memory or other ranks."""
