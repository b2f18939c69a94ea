"""Tools to run the app on Flower's Deployment Engine."""
