"""A Flower app with a hand-written federated-learning round, based on the low-level API."""

__version__ = "2.1.0"
