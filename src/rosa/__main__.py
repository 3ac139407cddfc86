"""`python -m rosa` is the command `rosa`; `torchrun -m rosa` starts it in several processes."""

from rosa.cli import main

main()
