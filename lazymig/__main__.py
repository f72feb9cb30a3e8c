"""``python -m lazymig`` is ``lazymig``."""

from lazymig.cli import main

main(prog_name="lazymig")
