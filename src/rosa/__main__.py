"""`python -m rosa` is the command `rosa`; `torchrun -m rosa` starts it in several processes."""

from rosa.cli.commands import main

main()
