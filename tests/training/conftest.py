"""Makes `toy`, which is also a program of its own, importable here."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent))
