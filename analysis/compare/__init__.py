"""Compare arms on the same weights and seeds: what is compared, how it runs, what it is held against."""
