"""merino-edge: design, train, export and run small language models for NVIDIA Jetson boards."""

import os

__version__ = "0.1.0"

# Installed, export/, runtime/, jetson/ and search/ are folders of this one. In a checkout they stand beside it, where
# `python -m` finds this folder first even if the package is installed elsewhere.
if not os.path.isdir(os.path.join(__path__[0], "search")):
    __path__.append(os.path.dirname(__path__[0]))
