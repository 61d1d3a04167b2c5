"""The backends: each can be read, replaced or added whole. ``base.py`` holds the contract."""
