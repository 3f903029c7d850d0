"""Build entry point: everything static is in pyproject.toml; here is only what needs code.

Three source roots: `megacid` at the top, `megacid_kernels` in `kernels/`, and `tools/`, installed as `megacid_tools`.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

CHECKOUT_ONLY = {"bench", "bench_gpu", "tune"}  # they need tools/benchmarks, which is not installed


class BuildPackages(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [entry for entry in modules if package != "megacid_tools" or entry[1] not in CHECKOUT_ONLY]


setup(
    packages=[
        *find_packages(include=["megacid", "megacid.*"]),
        *find_packages("kernels", include=["megacid_kernels", "megacid_kernels.*"]),
        "megacid_tools",
        "megacid_tools.figure_kinds",
    ],
    package_dir={
        "megacid": "megacid",
        "megacid_kernels": "kernels/megacid_kernels",
        "megacid_tools": "tools",
    },
    cmdclass={"build_py": BuildPackages},
)
