"""Compare arms on the same weights and seeds: experiments, the run, and peers."""
