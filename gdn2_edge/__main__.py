"""`python -m gdn2_edge`: the command line where the script is not on the path."""

from gdn2_edge.cli import main

main()
