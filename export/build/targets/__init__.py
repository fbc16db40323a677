"""Builders of engines, one backend a file."""
