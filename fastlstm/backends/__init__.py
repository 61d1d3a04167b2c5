"""The backends, a module or a folder each; ``base.py`` holds the interface that they implement."""
