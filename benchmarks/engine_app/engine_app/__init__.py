"""An app that only exchanges messages: see app.py."""
