"""What only a GPU can tell, measured by one command: `make silicon`."""
