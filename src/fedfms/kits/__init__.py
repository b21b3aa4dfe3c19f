"""What a kit says of itself, and whether it is as it was made."""
