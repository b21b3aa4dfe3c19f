"""From a provider's download to sites: one file for each data set, what they share once.

`source` reads a download and never changes it, `plan` says what a site will hold, `write` makes it.
"""
