"""Runtimes that are not torch's, one file a package that runs them."""
