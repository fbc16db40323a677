"""Images, labels and what is measured on them, without torch."""
