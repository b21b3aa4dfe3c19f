"""From a folder as it lies to a `site.yml`: what `fedfms adopt` sees and is unsure of."""
