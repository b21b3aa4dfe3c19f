"""Attacks on the product as it is, on phantoms: what a coordinator can learn of patients."""
