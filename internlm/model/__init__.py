"""Models: plain maths on parallel layers."""
