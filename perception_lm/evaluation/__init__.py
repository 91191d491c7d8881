"""How good answers are: what counts as right, and how sure that is."""
