"""Plans as plain data, and the routers that write plans."""
