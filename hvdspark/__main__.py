"""``python -m hvdspark``."""

from hvdspark.cli import main

main()
