"""`python -m olmozoo` is the `olmozoo` command."""

from olmozoo.cli import main

main()
