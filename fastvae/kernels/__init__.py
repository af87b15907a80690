"""The Triton kernels. A wheel holds them beside this file, a checkout in the folder `kernels` at its top: no link joins the two."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "mmd.py").is_file():
    __path__.append(str(_here.parents[1] / "kernels"))
