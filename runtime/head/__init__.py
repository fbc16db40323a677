"""From coarse scores to results of the image's own size, exactly."""
