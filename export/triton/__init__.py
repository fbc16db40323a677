"""A Triton model repository of an engine: repository.py writes it; model.py goes into it and runs in the server."""
