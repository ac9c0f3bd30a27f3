"""PEP 517 backend: setuptools, plus the tools this machine lacks, plus sight of the environment's torch.

An isolated build runs without the environment's packages. torch is needed there only for its headers and
libraries, so `native_build` looks the environment's copy up on disk, and nothing downloads another one.
"""

import native_build
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the rest of the PEP 517 and 660 interface)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + native_build.missing_tools()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + native_build.missing_tools()
