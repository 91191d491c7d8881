"""Faster twins of plain operators. Each is measured here before it is used, checked against its twin, and optional."""
