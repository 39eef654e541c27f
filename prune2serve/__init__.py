"""Make a large language model shallower, and put it into production safely."""

__version__ = "0.1.0"
