"""Training: recipes, data, one loop, and the objectives it can pursue."""
