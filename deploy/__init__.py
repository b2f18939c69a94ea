"""Running the app on the Deployment Engine."""
