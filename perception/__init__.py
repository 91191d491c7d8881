"""What Perception Encoder and Perception Language Model share."""

__version__ = "0.1.0"

# Another distribution on PyPI (`Perception`, image hashing) installs a package of this very name; the upper packages
# look for this mark.
__distribution__ = "perception-vision"
