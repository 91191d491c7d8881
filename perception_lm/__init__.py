"""The Perception Language Model side of the house. Empty in this release: encoders come first."""
