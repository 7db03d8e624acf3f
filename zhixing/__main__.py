"""`python -m zhixing` is `zhixing`."""

from zhixing.cli import main

main()
