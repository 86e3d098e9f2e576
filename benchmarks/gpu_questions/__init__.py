"""What a first GPU is asked, for benchmarks/first_gpu.py. Nothing needs to be installed: the checkout is found."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
