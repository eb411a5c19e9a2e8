"""Models: the decoder and its families, written as plain maths on parallel layers."""
