"""`python -m fastvae` is the command `fastvae`."""

from fastvae.cli import main

main()
