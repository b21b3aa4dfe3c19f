"""A page that shows runs while they go on, for a coordinator and whoever stands beside."""
