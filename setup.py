"""Settings are in pyproject.toml; this file is where csrc's extension will be built."""

from setuptools import setup

setup()
