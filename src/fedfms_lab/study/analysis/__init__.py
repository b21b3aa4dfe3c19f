"""From a study's runs to the numbers of its answer; no page yet."""
