"""Build entry point: everything static is in pyproject.toml; here is only what needs code.

Two source roots: `megacid` at the top and `megacid_kernels` below `kernels/`.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["megacid", "megacid.*"])
    + find_packages("kernels", include=["megacid_kernels", "megacid_kernels.*"]),
    package_dir={"megacid": "megacid", "megacid_kernels": "kernels/megacid_kernels"},
)
