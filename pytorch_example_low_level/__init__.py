"""A Flower app whose federated-learning round is written by hand, with the low-level API."""

__version__ = "2.0.0"
