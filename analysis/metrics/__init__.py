"""Quality, speed and cost: features in, name and value out."""
