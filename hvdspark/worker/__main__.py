"""Entry of a training process of its own: ``python -m hvdspark.worker ANSWERS MODULE …``."""

from __future__ import annotations

import sys

from hvdspark.worker.rank import preload, serve

if __name__ == "__main__":
    preload(sys.argv[2:])
    serve(int(sys.argv[1]))
