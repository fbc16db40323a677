"""From an image's pixels to the network's input: ranges, pixels without data, normalisation, padding."""
