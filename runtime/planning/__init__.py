"""How an image of some size will be run, and what that takes: decided before anything is allocated."""
