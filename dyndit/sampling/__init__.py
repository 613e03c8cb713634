"""From noise to pictures under a plan."""
