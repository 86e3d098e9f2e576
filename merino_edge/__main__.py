"""`python -m merino_edge`: the same program as `merino-edge`."""

from merino_edge.cli.main import main

main()
