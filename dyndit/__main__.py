"""`python -m dyndit`, and `accelerate launch -m dyndit`."""

from dyndit.cli import main

main()
