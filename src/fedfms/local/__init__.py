"""A federation on one machine: its sites and its processes."""
