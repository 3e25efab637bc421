"""`python -m mergekit_slta`, the same as `mergekit-slta`."""

from mergekit_slta.cli.main import main

main(prog_name="mergekit-slta")
