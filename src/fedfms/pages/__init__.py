"""Records as tables and pictures: what report and study are built of."""
