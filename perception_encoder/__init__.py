"""Perception Encoder: features, zero-shot classification and retrieval with any vision encoder."""
