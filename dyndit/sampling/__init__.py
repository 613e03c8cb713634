"""Sample from noise to pictures under a plan."""
