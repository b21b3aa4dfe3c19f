"""Checks before a site starts, and while it runs: kit, policy, network, machine; health."""
