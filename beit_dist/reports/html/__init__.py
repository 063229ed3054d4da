"""A page for a browser about a run, or several side by side: what is found of them apart from how it is shown."""
