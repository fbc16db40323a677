"""What a network expects and means, what an engine says of itself, and the file that holds it."""
