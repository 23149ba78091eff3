"""What `python -m bench` measures, a file for each kind of thing."""
