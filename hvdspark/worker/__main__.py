"""Entry of a training process of its own: ``python -m hvdspark.worker ANSWERS MODULE …``."""

from __future__ import annotations

import sys

from hvdspark.worker.rank import serve_after

if __name__ == "__main__":
    serve_after(sys.argv[2:], int(sys.argv[1]))
