"""Models: plain maths built from parallel layers."""
