"""Kits: what each participant of a federation gets, and how it is made, renewed and checked."""
