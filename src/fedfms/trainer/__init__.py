"""The process that sees images and no network, and the way to talk to it."""
