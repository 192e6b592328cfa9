"""Training: data, and one loop over the three frameworks."""
