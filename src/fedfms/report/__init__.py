"""A finished job's records to tables and a page. Never computes a score again."""
