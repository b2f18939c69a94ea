"""Real Fashion-MNIST images (12,000 to train, 2,000 to test) that come with `pip install`.

The folder of this package is a data set that `datasets.load_dataset` reads as it reads the
whole one from the Hub. README.md beside this file is its data card.
"""
