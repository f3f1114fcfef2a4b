"""Packages of alignvec. `kernels/` is a folder of its own and importable only as `alignvec.kernels`."""

from setuptools import find_namespace_packages, setup

setup(packages=find_namespace_packages(include=["alignvec", "alignvec.*"]))
