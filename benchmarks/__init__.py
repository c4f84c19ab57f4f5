"""Measurements that the documentation quotes, each a script of its own."""
