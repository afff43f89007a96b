"""`python -m entrenar` is the `entrenar` command."""

from entrenar.cli.main import main

main()
