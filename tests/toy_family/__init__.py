"""A family outside the package, in four short files: what adding one costs."""
