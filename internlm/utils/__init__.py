"""Helpers of the lowest layer, which import no other package of the framework."""
