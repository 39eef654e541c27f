"""Serve a build over HTTP and measure it against its parent."""
