"""Plumbing that edits of graphs share."""
