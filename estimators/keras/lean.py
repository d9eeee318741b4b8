"""Imports Keras without what a rank or a scorer never needs of it; imported before anything that imports Keras.

Where Matplotlib and scikit-learn are installed, Keras imports them for its plots and its scikit-learn wrappers, which
takes a quarter of its import time. They are hidden from that import only: the user's own code finds them as ever.
"""

from __future__ import annotations

import sys

_HIDDEN = ("matplotlib", "sklearn")

if "keras" not in sys.modules:
    absent = [name for name in _HIDDEN if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None says that there is no such module
    try:
        import keras  # noqa: F401
    finally:
        for name in absent:
            del sys.modules[name]
